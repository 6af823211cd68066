"""A checkpoint's network over images: features, logits, class weights, first-order distances."""
import functools

import torch

from utils import memory
from utils.activations import Activations
from utils.device import bf16_autocast
from utils.errors import UserError
from utils.eval import logits_of
from utils.lab import margins


class View:
    """A checkpoint's network over `batches`; one pass serves all measures that do not change the images.

    validation: the run's validation images, for calibration. layers: of distances, as for `Activations`, whose errors
    are a UserError.
    """

    def __init__(self, subject, layers):
        self.subject, self.model, self.batches, self.validation = subject, subject.model, None, None
        try:
            self.activations = Activations(self.model, layers)
        except ValueError as error:
            raise UserError(f'{subject.path}: {error}') from error
        self.activations.active = False
        self.dtype = next(self.model.parameters()).dtype

    def weight(self, need):
        """That of the head, (classes, features). UserError, which begins with `need`, if there is none."""
        weight, shape = getattr(self.model.head, 'weight', None), (self.model.num_classes, self.model.in_features)
        if not isinstance(weight, torch.Tensor) or weight.shape != shape:
            raise UserError(f'{need} a head with a weight of {shape[0]} classes x {shape[1]} '
                            f'features, and that of {self.subject.path} is a {type(self.model.head).__name__} without '
                            'one')
        return weight.detach().cpu()

    def network(self, inputs):
        """Logits (batch, classes), in float32 at least."""
        with bf16_autocast(inputs.device, self.subject.args.precision == 'bf16'):
            logits = logits_of(self.model(inputs))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @functools.cached_property
    def outputs(self):
        return self.outputs_on(self.batches)

    @torch.no_grad()
    def outputs_on(self, batches):
        """Features, logits, both float32, and targets of all images, on the CPU."""
        number, features, classes = len(batches.labels), self.model.in_features, self.model.num_classes
        memory.check(4 * number * (features + 3 * classes), f'the features and logits of {number} images', '--images')
        kept, places = (torch.empty(number, features), torch.empty(number, classes),
                        torch.empty(number, dtype=torch.int64)), range(0)
        for inputs, targets in batches:
            places = range(places.stop, places.stop + len(targets))
            with bf16_autocast(inputs.device, self.subject.args.precision == 'bf16'):
                features = self.model.features(inputs.to(self.dtype))
                logits = logits_of(self.model.classify(features))
            for tensor, values in zip(kept, (features, logits, targets)):
                tensor[places.start:places.stop] = values
        kept = tuple(tensor[:places.stop] for tensor in kept)  # fewer where files cannot be read
        bad = ~(kept[0].isfinite().all(dim=1) & kept[1].isfinite().all(dim=1))
        if bad.any():
            raise UserError(f'the network of {self.subject.path} gives NaN or infinite numbers for {int(bad.sum())} of '
                            f'{number} images, so there is nothing to measure')
        return kept

    def first_order(self, inputs, targets, top_k, **norms):
        """`margins.first_order` of a batch at the layers. UserError for a layer that has none."""
        self.activations.active = True
        try:
            return margins.first_order(self.network, self.activations, inputs.to(self.dtype), targets, top_k, **norms)
        except ValueError as error:
            raise UserError(f'{self.subject.path}: {error}') from error
        finally:
            self.activations.active = False
