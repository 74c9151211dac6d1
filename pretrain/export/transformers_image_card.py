"""The model card (README.md) of an image model that was exported to transformers.

In: a `Backbone`, what was exported and how closely it was reproduced. Out: Markdown.
"""

from __future__ import annotations

from pretrain.export.card import channels_text, compose_card, numbers, parameters_text, provenance, table
from pretrain.export.pictures import PIL_MODES, WHOLE_PICTURES, bit_depth_of, pictures_text
from pretrain.export.transformers import TransformersExport
from pretrain.models.vit import ViT
from pretrain.weights.backbone import Backbone


def vit_card(source: Backbone, encoder: ViT, exported: TransformersExport, tolerance: float) -> str:
    """The README.md of an exported folder.

    Args:
        source: what was exported.
        encoder: its model.
        exported: what was published, with the errors that were measured.
        tolerance: largest relative error that was allowed.
    """
    config, name = encoder.config, exported.folder.name
    summary = (
        f"A vision transformer (MAE, arXiv 2111.06377): width {config.width}, depth {config.depth}, {config.heads} "
        f"heads, patches of {config.patch_size[0]} x {config.patch_size[1]} pixels, {parameters_text(encoder)} in the "
        f"encoder. Input: {channels_text(config.in_channels)} of {config.image_size[0]} x {config.image_size[1]} "
        f"pixels, in [0, 1], then normalised with mean {numbers(source.mean)} and std {numbers(source.std)}."
    )
    more = ", add_pooling_layer=False" if exported.architecture == "ViTModel" else ""
    reader = "from PIL import Image" if "Image.open" in _opened(source) else "import numpy as np"
    use = (
        f"```python\n{reader}\nfrom transformers import AutoImageProcessor, {exported.architecture}\n\n"
        f'processor = AutoImageProcessor.from_pretrained("{name}")\n'
        f'model = {exported.architecture}.from_pretrained("{name}"{more}).eval()\n'
        f'images = processor({_opened(source)}, return_tensors="pt").pixel_values\n```'
    )
    if more:
        use += "\n\nWith a pooling layer, which the model does not have, transformers would make a random one."
    measured = ", ".join(f"of {what}: {error:.3g}" for what, error in exported.errors.items())
    reproduction = (
        "Reloaded with transformers before publication, every tensor and setting accounted for. Relative error, in "
        f"fp32 and on fixed random images, {measured}; allowed: {tolerance:.3g}.\n\n{pictures_text(exported.pictures)} "
        f"{WHOLE_PICTURES}"
    )
    sections = {"Use": use, "Provenance": table(provenance(source)), "Reproduction": reproduction}
    return compose_card(name, ("transformers", "vit", "masked-autoencoder"), summary, sections)


def _opened(source: Backbone) -> str:
    """The expression that reads a picture for the processor, and what else it needs."""
    channels, bits = len(source.mean), bit_depth_of(source)
    if bits == 8 and channels in PIL_MODES:
        return f'Image.open("picture.jpg").convert("{PIL_MODES[channels]}")'
    kind = "float32" if bits == 16 else "uint8"
    return f'np.load("picture.npy").astype("{kind}"), input_data_format="channels_last"'
