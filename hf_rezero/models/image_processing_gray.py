"""Images as one channel of grey values, for models with `num_channels=1`.

The image processors of transformers make three channels of every image, even of grey ones; none makes one channel.
"""

from PIL import Image
from transformers import ViTImageProcessorPil


class GrayImageProcessorPil(ViTImageProcessorPil):
    """`ViTImageProcessor` for grey values.

    Example:
        >>> processor = GrayImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
        >>> processor(Image.new("RGB", (8, 8), "white"), return_tensors="pt").pixel_values.shape
        torch.Size([1, 1, 8, 8])
    """

    def process_image(self, image, **kwargs):
        """Turn one image into an array [1, H, W]; arrays must have one channel already."""
        if isinstance(image, Image.Image):
            image = image.convert("L")
        return super().process_image(image, **kwargs)
