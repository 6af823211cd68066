"""Adversarial examples: the fast gradient sign method and projected gradient descent, in the maximum norm."""
import torch

from utils.eval import cross_entropy
from utils.pixels import Pixels


class Attack:
    """(inputs, targets) -> inputs that raise the cross-entropy, each pixel at most `epsilon` from what it was and
    still a colour.

    kind: 'fgsm' is one step of epsilon along the sign of the gradient (Goodfellow et al., ICLR 2015, arXiv 1412.6572);
    'pgd' begins anywhere in the cube and makes `steps` steps of 2.5 epsilon / steps, put back into it after each
    (Madry et al., ICLR 2018, arXiv 1706.06083). epsilon is in units of pixels between 0 and 1.

    outputs: a function inputs -> what the model returns. mean, std: (3,), what pixels of 0 to 255 were normalised
    with; inputs (batch, 3, height, width) are normalised, and so is the result. generator: of the random start, on
    their device.
    """

    def __init__(self, kind, outputs, epsilon, steps, mean, std, generator):
        self.kind, self.outputs, self.epsilon, self.generator = kind, outputs, epsilon, generator
        self.steps, self.step = (1, epsilon) if kind == 'fgsm' else (steps, 2.5 * epsilon / steps)
        self.pixels = Pixels(mean, std)

    def __call__(self, inputs, targets):
        reach = self.epsilon * self.pixels.unit
        low, high = (torch.maximum(inputs - reach, self.pixels.black), torch.minimum(inputs + reach, self.pixels.white))
        moved = inputs
        if self.kind == 'pgd':
            start = torch.rand(inputs.shape, generator=self.generator, device=inputs.device)
            moved = torch.lerp(low, high, start.to(inputs.dtype))
        for _ in range(self.steps):
            with torch.enable_grad():
                moved = moved.detach().requires_grad_()
                gradient, = torch.autograd.grad(cross_entropy(self.outputs(moved), targets), moved)
            moved = self.pixels.uphill(moved, gradient, self.step).clamp(low, high)
        return moved.detach()
