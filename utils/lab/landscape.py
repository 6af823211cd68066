"""The loss of a network over fixed images, as a function of its weights."""
import torch
from torch.func import functional_call

from smoothout import adapted, batch_norm_parameters, draw
from utils.device import bf16_autocast
from utils.eval import Meter, cross_entropy, predict


class Landscape:
    """Loss and accuracy of `model` in evaluation over `batches`, at any weights. The model itself keeps its own.

    weights: those of the model, one vector (P,) on its device, parameter after parameter in the order of
    named_parameters(), each in row-major order. buffers: a dict of the model's other tensors, such as BatchNorm's
    statistics. Both are the default of the methods below. All losses are cross-entropy, the mean over the images,
    summed in float64.

    adjust: a function of what the model returns that gives logits instead, or None. tta: None, or 'mirror' as in
    `utils.eval.predict`.

    batches: a data.Batches, or anything with its length, num_classes and labels that gives (inputs, targets) the same
    way each time. precision: 'bf16' passes under autocast, else the passes have the dtype of the weights.
    """

    def __init__(self, model, batches, precision='fp32'):
        self.model, self.batches, self.precision = model.eval(), batches, precision
        self.adjust, self.tta = None, None
        named = dict(model.named_parameters())
        self.shapes = {name: p.shape for name, p in named.items()}
        self.weights = torch.cat([p.detach().reshape(-1) for p in named.values()])
        self.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        in_batch_norm = {id(p) for p in batch_norm_parameters(model)}
        self.in_batch_norm = [name for name, p in named.items() if id(p) in in_batch_norm]

    def tensors(self, vector):
        """A vector (P,) as a dict of views, one for each parameter in its shape."""
        pieces = vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces)}

    def outputs(self, tensors, inputs):
        """What the model returns for `inputs`, (batch, 3, height, width); tensors: its parameters and buffers by name.
        """
        with bf16_autocast(inputs.device, self.precision == 'bf16'):
            outputs = predict(lambda images: functional_call(self.model, tensors, (images,)),
                              inputs.to(self.weights.dtype), self.tta)
        return self.adjust(outputs) if self.adjust else outputs

    @torch.no_grad()
    def measure(self, weights=None, buffers=None, meter=None, inputs_of=None, bar=None):
        """{'Loss': mean cross-entropy, 'Top-1': percent} and with more than five classes 'Top-5'.

        meter: a Meter that counts, to be asked for more. inputs_of: a function (inputs, targets) -> inputs in their
        place, such as an attack. bar: a ProgressLine over the batches.
        """
        tensors = self.at(weights, buffers)
        meter = meter or Meter(len(self.batches), self.batches.num_classes, self.weights.device)
        for inputs, targets in self.batches:
            outputs = self.outputs(tensors, inputs_of(inputs, targets) if inputs_of else inputs)
            meter.update(outputs, targets, cross_entropy(outputs, targets))
            if bar:
                bar.advance(meter)
        return meter.read()

    def at(self, weights=None, buffers=None):
        """The model's tensors by name, for `outputs`."""
        return {**(self.buffers if buffers is None else buffers),
                **self.tensors(self.weights if weights is None else weights)}

    def loss_and_gradient(self, weights):
        """The loss, a float64 scalar, and its gradient (P,)."""
        weights = weights.detach().requires_grad_()
        total, gradient = torch.zeros((), dtype=torch.float64, device=weights.device), torch.zeros_like(weights)
        for loss in self._shares(weights):
            gradient += torch.autograd.grad(loss, weights)[0]
            total += loss.detach()
        return total, gradient

    def hessian_product(self, vector):
        """The Hessian of the loss at the model's weights times a vector (P,)."""
        weights, product = self.weights.detach().requires_grad_(), torch.zeros_like(vector)
        for loss in self._shares(weights):
            gradient, = torch.autograd.grad(loss, weights, create_graph=True)
            product += torch.autograd.grad(gradient, weights, vector)[0]
        return product

    def _shares(self, weights):
        """What each batch adds to the mean loss over all images, as functions of `weights`."""
        for inputs, targets in self.batches:
            outputs = self.outputs(self.at(weights), inputs)
            yield cross_entropy(outputs, targets) * (len(targets) / len(self.batches.labels))

    def noise(self, generator, noise='uniform', adapt='none', batch_norm=False):
        """A random direction (P,) as SmoothOut draws its noise, for ss = 1.

        noise, adapt: as for SmoothOut; 'normal' and 'filter' give the filter-normalised direction of Li et al. (arXiv
        1712.09913).
        batch_norm: also move BatchNorm's weights and biases. generator: on the device of the weights.
        """
        chosen = [name for name in self.shapes if batch_norm or name not in self.in_batch_norm]
        own, direction = self.tensors(self.weights), torch.zeros_like(self.weights)
        weights, places = [own[name] for name in chosen], self.tensors(direction)
        for name, value in zip(chosen, adapted(draw(weights, noise, generator), weights, adapt)):
            places[name].copy_(value)
        return direction

    @torch.no_grad()
    def estimated_buffers(self, batches, weights=None):
        """The buffers with BatchNorm's statistics estimated for `weights`: over `batches`, each counting by its
        images.

        All else, such as dropout, stays as in evaluation. A batch of one image, which has no variance, does not count.
        """
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        layers = [module for module in self.model.modules()
                  if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.track_running_stats]
        momenta, seen, tensors = [layer.momentum for layer in layers], 0, self.at(weights, buffers)
        try:
            for inputs, targets in batches if layers else ():
                if len(targets) == 1:
                    continue
                seen += len(targets)
                for layer in layers:
                    layer.training, layer.momentum = True, len(targets) / seen
                self.outputs(tensors, inputs)
        finally:
            for layer, momentum in zip(layers, momenta):
                layer.training, layer.momentum = False, momentum
        return buffers
