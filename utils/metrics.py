"""What one accuracy hides: accuracy of each class, balanced accuracy, the confusion matrix, calibration."""
import csv
import statistics

import numpy as np
import torch

from utils import distributed
from utils.errors import UserError, shown
from utils.eval import Meter, logits_of
from utils.files import drawn, open_text, replacing, save_figure


class Predictions(Meter):
    """A Meter that also keeps the probabilities and the targets of all images, on the device until they are asked for.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.probabilities, self.targets = [], []

    def update(self, outputs, targets, loss):
        super().update(outputs, targets, loss)
        self.probabilities.append(torch.softmax(logits_of(outputs).float(), dim=1))
        self.targets.append(targets)

    def of_all_images(self):
        """Probabilities (N, classes), float32, and targets (N,) of the images of all processes, NumPy arrays."""
        local = [(p.cpu().numpy(), targets.cpu().numpy()) for p, targets in zip(self.probabilities, self.targets)]
        pairs = [pair for pairs in distributed.all_gather(local) for pair in pairs]
        return tuple(np.concatenate(arrays) for arrays in zip(*pairs))


def of_classes(probabilities, targets):
    """A dict of numbers in percent, and the confusion matrix (classes, classes): rows are true, columns predicted
    classes.

    'class accuracy': a list, the recall of each class (None where there is no image of it). 'balanced accuracy': their
    mean. 'calibration error': see `calibration_error`.
    probabilities: (N, classes). targets: (N,), class indices.
    """
    classes = probabilities.shape[1]
    wrong = np.isnan(probabilities).any(axis=1).sum().item()
    if wrong:
        raise UserError(f'the network gives NaN for {wrong} of {len(targets)} images, so there is nothing to measure')
    places = targets * classes + probabilities.argmax(axis=1)
    confusion = np.bincount(places, minlength=classes ** 2).reshape(classes, classes)
    number = confusion.sum(axis=1)
    recall = np.where(number > 0, confusion.diagonal() / np.maximum(number, 1), np.nan)
    values = {'balanced accuracy': 100 * np.nanmean(recall).item(),
              'calibration error': 100 * calibration_error(probabilities, targets),
              'class accuracy': [None if np.isnan(value) else 100 * value for value in recall.tolist()]}
    return values, confusion


def in_result(tested, by_class):
    """What a Meter and `of_classes` gave of the test images, by its names in result.json; loss and calibration error
    are there as NLL and ECE too.
    """
    named = {**tested, **by_class, 'NLL': tested['Loss'], 'ECE': by_class['calibration error']}
    return {f'test {name}'.lower(): value for name, value in named.items()}


def calibration_error(probabilities, targets, bins=15):
    """Expected calibration error (Guo et al., ICML 2017, arXiv 1706.04599, equation 3), from 0 to 1.

    Images are put into `bins` bins of equal width by their confidence, the highest probability, the upper edge
    included; the error is the mean over images of |accuracy - mean confidence| of their bin. scikit-learn has it for
    two classes only.
    """
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == targets
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return np.abs(np.bincount(place, correct - confidence, bins)).sum().item() / len(targets)


def class_report(classes, values, at_most=20):
    """What `of_classes` gave as lines of text; of more than `at_most` classes only the worst."""
    ordered = sorted((share, name) for share, name in zip(values['class accuracy'], classes) if share is not None)
    words = [f'{shown(name)} {share:.2f}%' for share, name in ordered[:at_most]]
    width = max(map(len, words)) + 2
    lines = [''.join(word.ljust(width) for word in words[i:i + 5]).rstrip() for i in range(0, len(words), 5)]
    worst = f', the {at_most} worst of {len(classes)}' if len(ordered) > at_most else ''
    return '\n'.join([f'balanced accuracy {values["balanced accuracy"]:.2f}% | calibration error '
                      f'{values["calibration error"]:.2f}% | '
                      f'accuracy by class{worst}:', *lines])


def spread(values):
    """(mean, standard deviation or None of a single value); where a value is infinite the deviation is NaN."""
    if len(values) == 1:
        return values[0], None
    if not np.isfinite(values).all():
        return float(np.mean(values)), np.nan
    return statistics.fmean(values), statistics.stdev(values)


def plus_minus(mean, deviation, form):
    """A mean in the format `form`, and what `spread` gave beside it with as many digits."""
    return f'{mean:{form}}' + ('' if deviation is None else f' +- {deviation:{form.removeprefix("+")}}')


def write_confusion(matrix, classes, table, picture):
    """The confusion matrix as a CSV file `table` with the classes as header and first column, and as a picture of its
    rows' shares.
    """
    from matplotlib.figure import Figure

    with replacing(table) as temporary, open_text(temporary, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['true \\ predicted', *classes])
        writer.writerows([name, *row] for name, row in zip(classes, matrix.tolist()))
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(3 + 0.5 * min(len(classes), 30),) * 2, layout='constrained')
    axes = figure.add_subplot()
    axes.imshow(shares, cmap='Blues')
    axes.set(title='percent of each true class', xlabel='predicted class', ylabel='true class', xticks=[], yticks=[])
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), map(drawn, classes), rotation='vertical')
        axes.set_yticks(range(len(classes)), map(drawn, classes))
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f'{share:.0f}', ha='center', va='center',
                      color='white' if share > shares.max() / 2 else 'black')
    save_figure(figure, picture, dpi=100)
