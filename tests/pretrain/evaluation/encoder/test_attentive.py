"""The attentive probe against torch's and transformers' attention, and its grid against probes trained alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.evaluation.encoder.attentive import (
    AttentiveConfig,
    AttentiveProbe,
    CrossAttentionBlock,
    accuracies,
    check_attentive,
    evaluate_attentive,
    fit_probes,
)
from pretrain.evaluation.encoder.datasets import open_evaluation_data
from pretrain.evaluation.encoder.features import make_accelerator
from pretrain.evaluation.encoder.subject import Loading, Subject
from pretrain.evaluation.encoder.tokens import Tokens, size_bytes
from pretrain.evaluation.encoder.views import VideoConfig, Views
from pretrain.models.video_vit import VideoViT
from pretrain.optim import parameter_groups
from pretrain.weights.backbone import load_backbone

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

SMALL = AttentiveConfig(
    learning_rates=(3e-3, 1e-3), weight_decays=(0.01, 0.4), blocks=2, heads=2, epochs=3, batch=8, refit=False
)


@pytest.fixture(scope="module")
def subject(video_run_dir: Path, videos: Path) -> Subject:
    backbone = load_backbone(video_run_dir)
    video = VideoConfig(views=Views(1, 3), train_views=Views(1, 2))
    data = open_evaluation_data(backbone, train=None, test=str(videos / "val"), resize_ratio=None, video=video)
    loading = Loading(batch_size=5, workers=0, feature_dtype=torch.float32, num_blocks=1)
    return Subject(backbone, data, "all", make_accelerator(cpu=True), loading, lambda what, done, total: None)


def test_pooling_is_multihead_attention_without_output_projection() -> None:
    block = CrossAttentionBlock(24, heads=4)
    reference = nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat((block.query.weight, block.key_value.weight)))
        reference.in_proj_bias.copy_(torch.cat((block.query.bias, block.key_value.bias)))
        reference.out_proj.weight.copy_(torch.eye(24))
        reference.out_proj.bias.zero_()
        query, tokens = torch.randn(3, 1, 24), torch.randn(3, 7, 24)
        normed = block.norm1(tokens)
        pooled = query + reference(query, normed, normed, need_weights=False)[0]
        torch.testing.assert_close(block(query, tokens), pooled + block.mlp(block.norm2(pooled)))


def test_the_probe_is_that_of_v_jepa_2_in_transformers() -> None:
    """All weights are copied, the blocks' norms have another epsilon in transformers' configuration."""
    modeling = pytest.importorskip("transformers.models.vjepa2.modeling_vjepa2", reason="transformers is optional")
    from transformers import VJEPA2Config

    config = VJEPA2Config(hidden_size=24, num_attention_heads=4, num_pooler_layers=3, layer_norm_eps=1e-5)
    config._attn_implementation = "eager"
    theirs, ours = modeling.VJEPA2AttentivePooler(config).eval(), AttentiveProbe(24, heads=4, blocks=4, num_classes=5)
    nn.init.normal_(theirs.query_tokens)
    with torch.no_grad():
        ours.query.copy_(theirs.query_tokens)
        for block, layer in zip(ours.blocks, theirs.self_attention_layers, strict=True):
            attention = layer.self_attn
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            block.attn.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            block.attn.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
            block.attn.proj.load_state_dict(attention.out_proj.state_dict())
            block.norm1.load_state_dict(layer.layer_norm1.state_dict())
            block.norm2.load_state_dict(layer.layer_norm2.state_dict())
            block.mlp.load_state_dict(layer.mlp.state_dict())
        last, attention = ours.pool, theirs.cross_attention_layer.cross_attn
        last.query.load_state_dict(attention.q_proj.state_dict())
        last.key_value.weight.copy_(torch.cat((attention.k_proj.weight, attention.v_proj.weight)))
        last.key_value.bias.copy_(torch.cat((attention.k_proj.bias, attention.v_proj.bias)))
        last.norm1.load_state_dict(theirs.cross_attention_layer.layer_norm1.state_dict())
        last.norm2.load_state_dict(theirs.cross_attention_layer.layer_norm2.state_dict())
        last.mlp.load_state_dict(theirs.cross_attention_layer.mlp.state_dict())
        tokens = torch.randn(2, 9, 24)
        torch.testing.assert_close(ours(tokens), ours.classifier(theirs(tokens)), atol=1e-5, rtol=1e-5)


def test_what_is_added_to_the_residual_stream_starts_smaller_with_depth() -> None:
    torch.manual_seed(0)
    probe = AttentiveProbe(192, heads=4, blocks=3, num_classes=2)
    for weight, depth in (
        (probe.blocks[0].mlp.fc2.weight, 2),  # type: ignore[union-attr]
        (probe.blocks[1].attn.proj.weight, 3),  # type: ignore[union-attr]
        (probe.pool.mlp.fc2.weight, 1),
        (probe.pool.query.weight, 0.5),
    ):
        assert float(weight.detach().std()) == pytest.approx(0.02 / math.sqrt(2 * depth), rel=0.05)


def test_every_probe_of_the_grid_equals_one_trained_alone(subject: Subject) -> None:
    tokens, samples = Tokens(subject, "train", 1 << 30), torch.arange(20)
    together = fit_probes(subject, tokens, samples, SMALL)
    torch.manual_seed(SMALL.seed)
    alone = [AttentiveProbe(16, 2, 2, 2) for _ in range(4)][2]  # the third: rate 1e-3, weight decay 0.01
    optimizer = torch.optim.AdamW(parameter_groups(alone.named_parameters(), 0.01), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    generator = torch.Generator().manual_seed(SMALL.seed)
    for _ in range(3):
        for inputs, labels in tokens.batches(torch.randperm(20, generator=generator), 8):
            loss = nn.functional.cross_entropy(alone(inputs), labels[:, None].expand(-1, 2).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for found, expected in zip(together[2].parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_tokens_are_the_encoders_and_the_same_whether_kept_or_computed_again(subject: Subject) -> None:
    kept, again = Tokens(subject, "test", 1 << 30), Tokens(subject, "test", 0)
    assert (kept.is_cached, again.is_cached) == (True, False)
    assert size_bytes(subject, kept.dataset) == 2 * 16 * 3 * 8 * 16
    chosen = torch.tensor([7, 0, 11])
    pairs = list(zip(kept.batches(chosen, 2), again.batches(chosen, 2), strict=True))
    assert [len(labels) for (_, labels), _ in pairs] == [2, 1]
    model = subject.backbone.model
    assert isinstance(model, VideoViT)
    for (one, one_labels), (other, other_labels) in pairs:
        torch.testing.assert_close(one, other, atol=5e-3, rtol=1e-3)  # float16
        assert torch.equal(one_labels, other_labels)
    with torch.no_grad():
        expected = model((subject.data.test[0][0] / 255 - 0.4) / 0.25)
    torch.testing.assert_close(pairs[0][1][0][3:6], expected, atol=1e-5, rtol=1e-5)
    assert pairs[0][1][1].tolist() == [1, 0]


def test_views_of_a_test_video_are_averaged_after_the_softmax(subject: Subject) -> None:
    tokens = Tokens(subject, "test", 1 << 30)
    torch.manual_seed(0)
    probe = AttentiveProbe(16, 2, 2, 2).eval()
    nn.init.normal_(probe.classifier.weight, std=3.0)
    right = 0
    with torch.no_grad():
        for sample in range(16):
            inputs, labels = next(tokens.batches(torch.tensor([sample]), 1))
            right += int(probe(inputs).softmax(1).mean(0).argmax() == labels[0])
    assert accuracies(subject, [probe], tokens, torch.arange(16), 5) == [100 * right / 16]
    nn.init.constant_(probe.classifier.bias, math.nan)
    assert accuracies(subject, [probe], tokens, torch.arange(16), 5) == [0.0]


def test_the_probe_tells_brighter_from_darker(subject: Subject) -> None:
    config = AttentiveConfig(
        learning_rates=(1e-2, 1e-6), weight_decays=(0.01,), blocks=1, heads=2, epochs=30, batch=8, refit=True
    )
    outcome = evaluate_attentive(subject, config)
    assert outcome.metrics["top1"] > 90
    assert outcome.selection["head"] == {"learning_rate": 1e-2, "weight_decay": 0.01}
    assert outcome.metrics["top1_best_head_on_test"] >= outcome.metrics["top1"]
    assert (outcome.num_train, outcome.num_test, outcome.selection["num_held_out"]) == (24, 16, 2)
    assert evaluate_attentive(subject, config) == outcome


def test_what_cannot_run_is_said_first(subject: Subject) -> None:
    with pytest.raises(ValueError, match=r"tasks\.a\.settings\.heads is 3, which does not divide .* width of 16"):
        check_attentive(subject, AttentiveConfig(heads=3), "tasks.a.settings")
    with pytest.raises(ValueError, match="is empty"):
        AttentiveConfig(weight_decays=())
    with pytest.raises(ValueError, match="blocks=0"):
        AttentiveConfig(blocks=0)
