"""Center loss, written as somebody who adds a method would: Wen, Zhang, Li and Qiao, ECCV 2016, equation 2, learned
centres.

    loss = coef * mean over the batch of 1/2 |features - centre of the target's class|^2
"""
import torch
from torch import nn


class CenterLoss(nn.Module):
    def __init__(self, num_classes, in_features, coef):
        super().__init__()
        self.centres, self.coef = nn.Parameter(torch.randn(num_classes, in_features)), coef

    def forward(self, outputs, targets, activations):
        features, = activations
        distances = (features.to(self.centres.dtype) - self.centres[targets]).square().sum(dim=1)
        return self.coef * distances.mean() / 2


def add_arguments(parser):
    parser.add_argument('--center-coef', type=float, default=0.01)
    parser.add_argument('--center-lr', type=float, default=0.5)


def loss_term(args, model):
    return CenterLoss(model.num_classes, model.in_features, args.center_coef)


def layers(args):
    return ['features']


def parameter_groups(args, model):
    centres = model.loss_terms['center'].parameters()
    return [{'params': list(centres), 'lr': args.center_lr, 'weight_decay': 0.0}]
