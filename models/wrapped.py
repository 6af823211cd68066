"""A network of another library, such as torchvision, whose last layer becomes a head that can be swapped."""
import torch.nn as nn

from models.base import ImageClassifier, WithAuxiliary


class TorchvisionClassifier(ImageClassifier):
    """`backbone`, a classification network, whose linear layer `last` (a name) is replaced by `head`.

    classifier: (in_features, num_classes) -> head; nn.Linear stands for the layer that is there.
    auxiliary_weight: of the cross-entropy of each auxiliary classifier, in a network that has any.
    """

    def __init__(self, backbone, last, classifier=nn.Linear, auxiliary_weight=0.0):
        super().__init__()
        layer = backbone.get_submodule(last)
        backbone.set_submodule(last, nn.Identity())
        self.backbone = backbone
        self.auxiliary_weight = auxiliary_weight
        keep_layer = classifier is nn.Linear
        self.set_head(layer.in_features, layer.out_features, (lambda *_: layer) if keep_layer else classifier)

    def features(self, x):
        return self._run(x)[0]

    def forward(self, x, targets=None):
        """Whatever the head returns, in training inside of a WithAuxiliary if the network has auxiliary classifiers."""
        features, *auxiliary = self._run(x)
        outputs = self.classify(features, targets)
        return WithAuxiliary(outputs, auxiliary, self.auxiliary_weight) if auxiliary else outputs

    def _run(self, x):
        """The features, then the logits of each auxiliary classifier, which torchvision's forward returns in training
        only.
        """
        outputs = self.backbone(x)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def last_layer(arch, network, num_classes):
    """The name, in `network.named_modules()`, of the linear layer that it ends in: its last module that holds
    parameters.

    ValueError, naming `arch`, if that is not a linear layer with num_classes outputs.
    """
    name, layer = [pair for pair in network.named_modules() if list(pair[1].parameters(recurse=False))][-1]
    if not isinstance(layer, nn.Linear) or layer.out_features != num_classes:
        raise ValueError(f"--arch {arch} cannot take a method's head: it does not end in a linear layer but in "
                         f'a {type(layer).__name__} ({name})')
    return name
