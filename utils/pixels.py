"""Images that are normalised, in units of pixels: how far it is from black to white, and steps that stay in between."""


class Pixels:
    """mean, std: (3,), what pixels of 0 to 255 were normalised with.

    unit: (3, 1, 1), a change of 1 between black and white, as it is after normalising. black, white: (3, 1, 1), these
    colours as they are after it.
    """

    def __init__(self, mean, std):
        self.unit = (255 / std).view(3, 1, 1)
        self.black, self.white = ((colour - mean).view(3, 1, 1) / std.view(3, 1, 1) for colour in (0, 255))

    def uphill(self, images, gradient, epsilon):
        """Images (batch, 3, height, width) after a step of the fast gradient sign method: each pixel is `epsilon`, with
        white - black = 1, further along the sign of the gradient, and still a colour (arXiv 1412.6572).
        """
        unit, black, white = (each.to(images.dtype) for each in (self.unit, self.black, self.white))
        return (images + epsilon * unit * gradient.sign()).clamp(black, white)
