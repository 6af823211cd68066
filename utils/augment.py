"""What is done to a batch of training images on the device: moved, mirrored, cut out; who is mixed with whom."""
import torch
import torch.nn.functional as F


def crop_and_flip(images, padding, offset, mirror, mode='zero'):
    """Pad, cut the original size back out at each image's own place, then mirror those that are to be mirrored.

    images: uint8 (batch, height, width, channels). offset: (batch, 2), row and column in 0..2*padding.
    mirror: bool (batch,). mode: the padding is black pixels, 'zero', or the image mirrored at its border pixels, which
    are not repeated, 'reflect', as torch.nn.functional.pad; then `padding` is less than height and width.
    """
    batch, height, width, _ = images.shape
    steps = torch.arange(max(height, width), device=images.device)
    rows = offset[:, :1] + steps[:height]
    columns = offset[:, 1:] + torch.where(mirror[:, None], width - 1 - steps[:width], steps[:width])
    if mode == 'reflect':  # F.pad does not reflect uint8 images, so the places are reflected
        padded = images
        rows, columns = reflected(rows - padding, height), reflected(columns - padding, width)
    else:
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    return padded[torch.arange(batch, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def reflected(positions, side):
    """Positions in 0..side-1; those up to side - 1 outside are mirrored at the first and the last."""
    return side - 1 - (side - 1 - positions.abs()).abs()


def alternating(images, epoch, generator):
    """Which of the images, in their own order, are mirrored in `epoch`: half of them, and the others in the next one.

    generator: made for each epoch from the seed of the run alone.

    As cifar10-airbench does (Jordan, arXiv 2404.00498, section 3.6): two epochs see each image once in either way.
    """
    first = torch.rand(images, generator=generator) < 0.5
    return first if epoch % 2 == 0 else ~first


def with_one_before(local, batch_size, images):
    """The places of a local part of a batch, a slice, led by that of the image before it in the batch of all processes.

    The first image of a batch comes after its last. An empty part, and a whole batch, has nothing in front.
    """
    places = list(range(local.start, local.stop))
    batch = range(local.start // batch_size * batch_size, min(-(-local.stop // batch_size) * batch_size, images))
    if not places or len(places) == len(batch):
        return places
    return [places[0] - 1 if places[0] > batch.start else batch.stop - 1, *places]


def cut_out(images, size, centre):
    """Set a square to 0, which is the mean colour after normalising (DeVries and Taylor, arXiv 1708.04552), in place.

    images: float (batch, channels, height, width). size: side of the square in pixels; what is outside of the image is
    lost.
    centre: (batch, 2), row and column.
    """
    inside = []
    for axis in (0, 1):
        start = centre[:, axis, None] - size // 2
        position = torch.arange(images.shape[2 + axis], device=images.device)
        inside.append((start <= position) & (position < start + size))
    return images.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)
