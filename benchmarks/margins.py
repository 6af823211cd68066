"""What measure_margins.py costs beyond its passes through the network, as ratios of times measured alternately in one
run.

    python benchmarks/margins.py                         LeNet, 1000 images, about three minutes on two cores

1. All numbers of --angles over one bare pass that keeps the features and the logits.
2. The first-order distances of --distances at the input, to all other classes, over a bare loop of one forward pass
   and one backward pass for each of these classes, which keeps the norms of the gradients: in one norm, and in all
   three from the same gradients.
3. The upper bound by DeepFool over a bare loop of the same passes, on the same images, which a first run records: in
   each step a forward pass and a backward pass for each other class, and a last forward pass, after which nothing is
   left to move.

All passes are over the same batches, which never leave the device and are already normalised. The targets are the
network's predictions, because DeepFool leaves images that are wrong after one step.

Every round times all pairs, one after the other; a ratio is taken within a round, and the median of the rounds is
printed.
"""
import argparse
import pathlib
import statistics
import sys
import types

import torch
from train_step import DEVICE, device_name, in_rounds, network

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from large_margin import DUAL  # noqa: E402
from utils.batches import Batches, Split  # noqa: E402
from utils.lab import margins  # noqa: E402
from utils.lab.view import View  # noqa: E402

CLASSES = 10
OTHERS = CLASSES - 1
PASSES = 5  # of the angles in one timing, because one is short


class Resident(list):
    """Batches (images, targets) that are kept, with the `labels` of all images as `View` reads them."""

    def __init__(self, batches):
        super().__init__(batches)
        self.labels = torch.cat([targets for _, targets in self])


def bare_passes(model, batches):
    with torch.no_grad():
        for _ in range(PASSES):
            kept = []
            for inputs, _ in batches:
                features = model.features(inputs)
                kept.append((features.cpu(), model.classify(features).cpu()))


def bare_gradients(model, inputs, targets, others, duals):
    """One forward pass, and for each k (batch, 1) of the list `others` a backward pass to the images: norms of the
    gradients of f_target - f_k.
    """
    inputs = inputs.detach().requires_grad_()
    logits = model(inputs)
    target = logits.gather(1, targets[:, None])
    norms = []
    for k in others:
        gradient, = torch.autograd.grad((target - logits.gather(1, k)).sum(), inputs, retain_graph=True)
        norms.append([torch.linalg.vector_norm(gradient.flatten(1), dual, dim=1) for dual in duals])
    return norms


def deepfool_passes(view, batches):
    """[(images (batch, 3, height, width), whether there is more than a forward pass)] of DeepFool over `batches`."""
    passes = []

    def recorded(inputs):
        passes.append((inputs.detach(), True))
        return view.network(inputs)

    for inputs, targets in batches:
        margins.deepfool(recorded, inputs, targets, '2', OTHERS)
        passes[-1] = passes[-1][0], False
    return passes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='lenet')
    parser.add_argument('--depth', type=int)
    parser.add_argument('--images', type=int, default=1000)
    parser.add_argument('--batch', type=int, default=500)
    parser.add_argument('--rounds', type=int, default=7)
    settings = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randint(256, (settings.images, 32, 32, 3), dtype=torch.uint8, generator=generator),
                  torch.zeros(settings.images, dtype=torch.int64), list('0123456789'))
    model = network(settings).eval()
    with torch.no_grad():
        batches = Resident([(inputs, model(inputs).argmax(dim=1)) for inputs, _
                            in Batches(split, *split.mean_and_std(), settings.batch, DEVICE)])
    subject = types.SimpleNamespace(model=model, path='random weights', device=DEVICE,
                                    args=types.SimpleNamespace(precision='fp32'))
    view = View(subject, ['input'])
    view.batches = batches
    others = [[(targets[:, None] + k) % CLASSES for k in range(1, CLASSES)] for _, targets in batches]

    def angles():
        for _ in range(PASSES):
            features, _, targets = view.outputs_on(batches)
            margins.angles(features, targets, view.weight('the angles need'))

    def bare_distances(*norms):
        duals = [DUAL[norm] for norm in norms]
        for (inputs, targets), of_batch in zip(batches, others):
            bare_gradients(model, inputs, targets, of_batch, duals)

    def distances(*norms):
        for inputs, targets in batches:
            view.first_order(inputs, targets, OTHERS, norms=norms)

    passes = deepfool_passes(view, batches)

    def bare_deepfool():
        for inputs, moves in passes:  # whichever class is the target, the passes are the same
            targets = torch.zeros(len(inputs), dtype=torch.int64, device=DEVICE)
            of_batch = [targets[:, None] + k for k in range(1, CLASSES)] if moves else []
            bare_gradients(model, inputs, targets, of_batch, [2])

    def deepfool():
        for inputs, targets in batches:
            margins.deepfool(view.network, inputs, targets, '2', OTHERS)

    timed = {f'{PASSES} times --angles / bare pass': (lambda: bare_passes(model, batches), angles),
             'first-order distances, norm 2 / bare loop': (lambda: bare_distances('2'), lambda: distances('2')),
             'the same in norms 1, 2 and inf': (lambda: bare_distances(*DUAL), lambda: distances(*DUAL)),
             'DeepFool / bare loop': (bare_deepfool, deepfool)}
    rounds, name = in_rounds(timed, settings.rounds), device_name()
    print(f'{settings.arch}, {settings.images} images, {settings.rounds} rounds, torch {torch.__version__}, {name}')
    moved = [len(inputs) for inputs, moves in passes if moves]
    print(f'DeepFool: {len(moved)} steps of together {sum(moved)} images')
    for name in timed:
        ratios = sorted(row[name][1] / row[name][0] for row in rounds)
        each = statistics.median(row[name][1] for row in rounds)
        print(f'{name}: {statistics.median(ratios):.3f}  (rounds {ratios[0]:.3f} to {ratios[-1]:.3f}; {each:.2f} s)')


if __name__ == '__main__':
    main()
