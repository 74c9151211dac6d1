"""The model card (README.md) of a backbone that was exported to timm.

In: a `Backbone`, what was exported and how closely it was reproduced. Out: Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.evaluation.encoder.views import view_short_side
from pretrain.export.by_hand import source_code
from pretrain.export.card import (
    NO_RESULTS,
    channels_text,
    compose_card,
    numbers,
    parameters_text,
    provenance,
    table,
    top1_results,
)
from pretrain.export.pictures import PIL_MODES, WHOLE_PICTURES, Errors, bit_depth_of, pictures_text
from pretrain.models.vit import ViT
from pretrain.weights.backbone import Backbone

_TAGS = ("image-feature-extraction", "timm", "masked-autoencoder")
"""For model hubs."""
_METADATA = {"library_name": "timm", "pipeline_tag": "image-feature-extraction"}
"""What timm's loader and model hubs read."""


def timm_card(
    backbone: Backbone,
    name: str,
    description: Mapping[str, Any],
    *,
    pool: str,
    max_difference: float,
    tolerance: float,
    pictures: Errors,
    shifted: float | None,
) -> str:
    """The README.md of an exported folder.

    Args:
        backbone: what was exported.
        name: the folder's name, used as title.
        description: the export's config.json.
        pool: `token` or `avg`.
        max_difference: largest absolute difference of timm's features from ours, as measured.
        tolerance: what was allowed, relative to the size of features larger than 1.
        pictures: of `TimmExport`.
        shifted: of `TimmExport`.
    """
    sections = {
        "Use": _snippets(name, description),
        "Preprocessing": _preprocessing(backbone, shifted),
        "Provenance": table(provenance(backbone)),
        "Reproduction": (
            "Reloaded with timm before publication, strictly and in both ways shown above. Largest absolute difference "
            "of any feature (all tokens and pooled, random inputs, fp32): "
            f"{max_difference:.3g}; allowed: {tolerance:.3g}, times the largest value where that exceeds "
            f"1.\n\n{pictures_text(pictures)} {WHOLE_PICTURES}"
        ),
        "Evaluation": _evaluation(backbone),
    }
    return compose_card(name, _TAGS, _summary(backbone, pool), sections, _METADATA)


def _summary(backbone: Backbone, pool: str) -> str:
    """The first paragraph."""
    assert isinstance(backbone.model, ViT)
    config = backbone.model.config
    height, width = config.image_size
    patch = " x ".join(str(side) for side in config.patch_size)
    pooled = "the class token" if pool == "token" else "the average of the patch tokens, normalised after averaging"
    pixels = f"{channels_text(config.in_channels)} of {height} x {width} pixels"
    return (
        f"A vision transformer backbone without a head: width {config.width}, depth {config.depth}, {config.heads} "
        f"heads, patches of {patch} pixels, {parameters_text(backbone.model)}. Input: {pixels}, in [0, 1], then "
        f"normalised with mean {numbers(backbone.mean)} and std {numbers(backbone.std)}. Pooled feature: {pooled}."
    )


def _preprocessing(backbone: Backbone, shifted: float | None) -> str:
    """How a picture becomes the model's input, and where that is not quite what our evaluation does."""
    size, bits, channels = backbone.interface.image_size, bit_depth_of(backbone), len(backbone.mean)
    full_scale = 2**bits - 1
    if shifted is None:
        mean, std = list(backbone.mean), list(backbone.std)
        return (
            "`timm.data.create_transform` resizes pictures for inputs that are not square in another way than our "
            "evaluation does. Use this function, which was compared:\n\n"
            f"```py\n{source_code()}\n\n"
            "pixels = torch.from_numpy(preprocess(\n"
            f"    np.asarray(picture), {size!r}, {view_short_side(size)}, full_scale={full_scale}\n))\n"
            f"images = torchvision.transforms.functional.normalize(pixels, {mean}, {std})[None]\n```"
        )
    opened = f'Image.open("picture.jpg").convert("{PIL_MODES.get(channels)}")'
    if bits != 8 or channels not in PIL_MODES:
        opened = f"torch.from_numpy(stored).float() / {full_scale}"
    kind = "a Pillow image" if bits == 8 and channels in PIL_MODES else "a float tensor [C, H, W] in [0, 1]"
    return (
        "```py\ndata = timm.data.resolve_model_data_config(model)\n"
        "transform = timm.data.create_transform(**data, is_training=False)\n"
        f"images = transform({opened})[None]\n```\n\n"
        f"The transform takes {kind}. Where the longer resized side of a picture exceeds the crop by 3, 7, 11, ... "
        "pixels, timm cuts one pixel beside the place where our evaluation does, for which timm has no setting; the "
        f"pooled feature of such a picture differed by {shifted:.3g} of its size."
    )


def _snippets(name: str, description: Mapping[str, Any]) -> str:
    """The code of both ways to load the export."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in description["model_args"].items())
    return (
        "```python\nimport timm\n\n"
        f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()\n'
        "features = model(images)                  # [B, D], pooled\n"
        "tokens = model.forward_features(images)   # [B, 1 + N, D], the class token first\n```\n\n"
        "or, without config.json:\n\n"
        "```python\nmodel = timm.create_model(\n"
        f'    "{description["architecture"]}", num_classes=0, checkpoint_path="{name}/model.safetensors",\n'
        f"    {arguments},\n).eval()\n```"
    )


def _evaluation(backbone: Backbone) -> str:
    """A table of the results, or a sentence that there are none."""
    rows = [
        f"| {result['task']} | `{result['protocol']}` | {result['metrics']['top1']:.2f} | {result['num_test']:,} |"
        for result in top1_results(backbone)
    ]
    if not rows:
        return NO_RESULTS
    return "\n".join(
        [
            "Frozen features; top-1 in percent.",
            "",
            "| task | protocol | top-1 | test images |",
            "|---|---|---|---|",
            *rows,
        ]
    )
