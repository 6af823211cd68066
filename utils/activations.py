"""What layers return on the way through a network, for losses that look inside it."""
import functools

import torch

from utils.errors import UserError


class Activations:
    """The outputs of the modules of `model` that `names` lists, in the newest pass that has gradients.

    A name is as in model.named_modules(); `input` is the images, which get a gradient of their own; `features` is what
    goes into the head. Of a module that is called several times in a pass it is the last output. The hooks stay as
    long as the model does; while `active` is false they do nothing. ValueError for a name that the model does not have,
    and from `read` for an output that cannot be used.
    """

    def __init__(self, model, names):
        modules = {name: module for name, module in model.named_modules() if name}
        for name in names:
            if name not in ('input', 'features') and name not in modules:
                outer = [name for name in modules if name.count('.') <= 1]
                raise ValueError(f'there is no layer {name!r} in this network, which has input {" ".join(outer[:40])} '
                                 'features and what these consist of')
        if len(set(names)) < len(names):
            raise ValueError(f'a layer is named twice in {" ".join(names)}')
        self.names, self.kept, self.active = names, {}, True
        for name in names:
            if name == 'input':
                model.register_forward_pre_hook(self._at_input)
            elif name == 'features':
                model.head.register_forward_pre_hook(self._at_head)
            else:
                modules[name].register_forward_hook(functools.partial(self._keep, name))

    def _at_input(self, model, inputs):
        if torch.is_grad_enabled() and self.active:
            # Images that require a gradient, such as a user's, keep their graph.
            images = inputs[0] if inputs[0].requires_grad else inputs[0].detach().requires_grad_()
            self._keep('input', model, None, images)
            return images, *inputs[1:]

    def _at_head(self, head, inputs):
        self._keep('features', head, None, inputs[0])

    def _keep(self, name, module, inputs, outputs):
        if torch.is_grad_enabled() and self.active:
            output = outputs[0] if isinstance(outputs, tuple) else outputs
            self.kept = self.kept or {}
            self.kept[name] = output, output._version

    def read(self):
        """The tensors, in the order of the names; they are no longer kept.

        UserError if they were read before, as where a loop calls the criterion twice.
        """
        kept, self.kept = self.kept, None
        if kept is None:
            raise UserError(f'the criterion needs the layers {" ".join(self.names)} of a forward pass with gradients, '
                            'and there was none since it was called last; call it once for each')
        for name in self.names:
            if name not in kept:
                raise ValueError(f'layer {name} takes no part in the forward pass')
            output, version = kept[name]
            if output._version != version:
                raise ValueError(f'layer {name} cannot be used, as what follows it overwrites its output in place; '
                                 'name the layer after it or before it')
        return [kept[name][0] for name in self.names]
