"""The model card (README.md) of a video model that was exported to transformers.

In: a `Backbone`, what was exported and how closely it was reproduced. Out: Markdown. It says what users of that library
trip over: there is no class token, and a classifier with mean pooling has a norm of its own.
"""

from __future__ import annotations

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
from pretrain.export.pictures import pictures_text
from pretrain.export.transformers import TransformersExport
from pretrain.models.video_vit import VideoViT
from pretrain.weights.backbone import Backbone

_TAGS = ("transformers", "videomae", "video-feature-extraction")
"""For model hubs."""
_FINE_TUNING = (
    "For fine-tuning, `VideoMAEForVideoClassification.from_pretrained(..., use_mean_pooling=True, num_labels=...)` "
    "averages the tokens and puts a new norm (`fc_norm`) after that; the encoder's own norm is then left out, and "
    "transformers says so. Without `use_mean_pooling=True` it would read the first token, which stands for a corner of "
    "the first frames."
)
"""What the card says of fine-tuning."""


def video_card(source: Backbone, encoder: VideoViT, exported: TransformersExport, tolerance: float) -> str:
    """The README.md of an exported folder.

    Args:
        source: what was exported.
        encoder: its model.
        exported: what was published, with the errors that were measured.
        tolerance: largest relative error that was allowed.
    """
    sections = {
        "Use": f"```python\n{_code(exported)}\n```\n\n{_frames_text(encoder, exported)}{_FINE_TUNING}",
        "Provenance": table(provenance(source) | {"frames": _frames(source)}),
        "Reproduction": _reproduction(exported, tolerance),
        "Evaluation": _evaluation(source),
    }
    return compose_card(exported.folder.name, _TAGS, _summary(source, encoder, exported), sections)


def _summary(source: Backbone, encoder: VideoViT, exported: TransformersExport) -> str:
    """The first paragraph."""
    config = encoder.config
    tubelet = " x ".join(str(side) for side in config.token_size)
    whole = " with its decoder" if "loss" in exported.errors else ""
    return (
        f"A video transformer (VideoMAE, arXiv 2203.12602){whole}: width {config.width}, depth {config.depth}, "
        f"{config.heads} heads, tubelets of {tubelet} (frames, height, width), {parameters_text(encoder)} in the "
        f"encoder. Input: {config.num_frames} frames of {channels_text(config.in_channels)} and "
        f"{config.image_size[0]} x {config.image_size[1]} pixels, in [0, 1], then normalised with mean "
        f"{numbers(source.mean)} and std {numbers(source.std)}. There is no class token: the feature of a clip is the "
        "mean of its tokens."
    )


def _frames(source: Backbone) -> str:
    """How the run took frames from a video."""
    video = None if source.config is None else source.config.data.video
    if video is None:
        return "not recorded"
    if video.mode == "segments":
        return f"one of each of {video.num_frames} equal parts of a video"
    rate = "" if video.fps is None else f" at {video.fps:g} frames per second"
    return f"{video.num_frames} of a video{rate}, {video.stride} from one to the next"


def _code(exported: TransformersExport) -> str:
    """The code that loads the export."""
    name, architecture = exported.folder.name, exported.architecture
    model = f'model = {architecture}.from_pretrained("{name}").eval()'
    lines = [f"from transformers import {architecture}", "", f"{model}  # clips: [batch, frames, channels, H, W]"]
    if "loss" not in exported.errors:
        lines += ["tokens = model(clips).last_hidden_state", "features = tokens.mean(dim=1)"]
    else:
        lines += [
            "loss = model(clips, bool_masked_pos=hidden).loss  # hidden: bool [batch, tokens]",
            "tokens = model.videomae(clips).last_hidden_state",
        ]
    if exported.has_processor:
        lines = [
            "from transformers import VideoMAEImageProcessor",
            "",
            f'processor = VideoMAEImageProcessor.from_pretrained("{name}")',
            'clips = processor(frames, return_tensors="pt").pixel_values  # frames: a list of uint8 [H, W, channels]',
            *lines,
        ]
    return "\n".join(lines)


def _frames_text(encoder: VideoViT, exported: TransformersExport) -> str:
    """What else users have to know of the frames, as a paragraph, or nothing."""
    height, width = encoder.config.image_size
    if not exported.has_processor:
        return (
            "The library's processor takes 1 or 3 channels, so there is none here. Our evaluation resizes frames "
            f"(bilinearly, with antialias, uint8) to the smallest size that {height} x {width} fits into, rounded "
            "down, and cuts out the centre.\n\n"
        )
    if height == width:
        return ""
    return (
        f"The input is not square. Our evaluation resizes frames to the smallest size that {height} x {width} fits "
        "into, rounded down; the processor's settings cannot say this. Pass that size: "
        '`processor(frames, size={"height": ..., "width": ...})`.\n\n'
    )


def _reproduction(exported: TransformersExport, tolerance: float) -> str:
    """What was compared, and how close it was."""
    text = (
        "Reloaded with transformers before publication, every tensor and setting accounted for. Relative error, in "
        f"fp32 and on fixed random clips, of the features of all tokens: {exported.errors['features']:.3g}"
    )
    errors = exported.errors
    pictures = f"\n\n{pictures_text(exported.pictures)}" if exported.pictures else ""
    if "loss" not in errors:
        return f"{text}; allowed: {tolerance:.3g}.{pictures}"
    return (
        f"{text}, of the predictions: {errors['predictions']:.3g}, of the loss: {errors['loss']:.3g}; allowed: "
        f"{tolerance:.3g}. Predictions and loss were compared with transformers' eps of the norm after the decoder, "
        "which is fixed there to 1e-5; the model was trained with 1e-6, which changes the predictions by "
        f"{errors['eps_effect']:.3g} of their size. The loss there counts all hidden tokens.{pictures}"
    )


def _evaluation(source: Backbone) -> str:
    """A table of the results, or a sentence that there are none."""
    rows = {
        f"{result['task']}, `{result['protocol']}`": f"top-1 {result['metrics']['top1']:.2f} %"
        for result in top1_results(source)
    }
    return table(rows) if rows else NO_RESULTS
