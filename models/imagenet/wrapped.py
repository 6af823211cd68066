"""A torchvision network whose last layer is a head that can be swapped."""
import torch.nn as nn

from models.base import ImageClassifier, WithAuxiliary


class TorchvisionClassifier(ImageClassifier):
    """`backbone`, a torchvision classification network, whose linear layer `last` (a name) has its place taken by `head`.

    classifier: (in_features, num_classes) -> head; nn.Linear stands for the layer that is there.
    auxiliary_weight: of the cross-entropy of each auxiliary classifier, in a network that has any.
    """
    regime = {0: {'weight_decay': 1e-4}}  # usual for ImageNet: He et al., CVPR 2016 (arXiv 1512.03385), section 3.4

    def __init__(self, backbone, last, classifier=nn.Linear, auxiliary_weight=0.0):
        super().__init__()
        layer = backbone.get_submodule(last)
        backbone.set_submodule(last, nn.Identity())
        self.backbone = backbone
        self.auxiliary_weight = auxiliary_weight
        self.set_head(layer.in_features, layer.out_features, (lambda *_: layer) if classifier is nn.Linear else classifier)

    def features(self, x):
        return self._run(x)[0]

    def forward(self, x, targets=None):
        """Whatever the head returns, in training inside of a WithAuxiliary if the network has auxiliary classifiers."""
        features, *auxiliary = self._run(x)
        outputs = self.classify(features, targets)
        return WithAuxiliary(outputs, auxiliary, self.auxiliary_weight) if auxiliary else outputs

    def _run(self, x):
        """The features, then the logits of each auxiliary classifier: torchvision's forward returns these in training alone."""
        outputs = self.backbone(x)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def last_layer(arch, network, num_classes):
    """The name, in `network.named_modules()`, of the linear layer that it ends in: its last module with parameters of its own.

    ValueError, naming `arch`, if that is not a linear layer with num_classes outputs.
    """
    name, layer = [(name, module) for name, module in network.named_modules() if list(module.parameters(recurse=False))][-1]
    if not isinstance(layer, nn.Linear) or layer.out_features != num_classes:
        raise ValueError(f"--arch {arch} cannot take a method's head: it does not end in a linear layer but in "
                         f'a {type(layer).__name__} ({name})')
    return name
