"""CoMa and MoCa through the pipeline: recipe to checkpoint, on tiny backbones over the photographs."""

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from short_run import STEPS, short_recipe
from toy import states_of
from transformers import AutoModelForImageTextToText

from cocoa import pipeline
from cocoa.backbone import Form, load_backbone
from cocoa.checkpoint import read_record
from cocoa.embedding import load_embedder
from cocoa.errors import CocoaError
from cocoa.pairs import Side
from cocoa.pipeline import train
from cocoa.recipe import parse_recipe

pytestmark = pytest.mark.slow
K = 4


def coma(backbone, data, dialogues, output, tuning="dora", **changes):
    """CoMa's two stages of two steps; the second one does not say how the first one's checkpoint is read."""
    content = short_recipe(backbone, data, output, tuning, **changes)
    common = dict(content["stages"][1]["eos_bridge"])
    compression = common | {"compression_tokens": K, "data": {"train": str(dialogues), "validation_rows": 0}}
    content["stages"] = [{"compression": compression}, content["stages"][2]]
    if tuning == "dora":
        content["lora"] |= {"vision": []}
    return content


@pytest.mark.parametrize(
    ("model_type", "tuning"),
    [("qwen2_vl", "dora"), ("qwen2_vl", "whole matrix"), ("qwen2_5_vl", "full"), ("qwen2_5_vl", "whole matrix")],
)
def test_coma_ends_in_a_checkpoint_that_all_read_alike(
    tiny_backbone_path, photo_data, photo_dialogues, pictures, tmp_path, model_type, tuning
):
    backbone = tiny_backbone_path(model_type, tied=model_type == "qwen2_vl")
    content = coma(backbone, photo_data, photo_dialogues, tmp_path / "run", "full" if tuning == "full" else "dora")
    if tuning == "whole matrix":
        content["lora"]["embeddings"] = "all"
    final = train(parse_recipe(content))
    before = None
    for folder in (tmp_path / "run" / "1-compression", final):
        record = read_record(folder)
        form = Form("causal", "compression", K)
        assert {key: record[key] for key in Form._fields} == form._asdict()
        assert 0.9999 < record["merge_cosine"] <= 1.00001
        stock, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        side = Side("Find the caption:", "A red cup.", pictures[0])
        loaded = load_backbone(folder, **form._asdict())
        expected = torch.nn.functional.normalize(states_of(loaded, side, stock)[-K:].mean(0), dim=0)
        served = SentenceTransformer(str(folder), device="cpu").encode(
            [{"image": side.image, "text": side.text}], prompt=side.instruction, convert_to_tensor=True
        )[0]
        torch.testing.assert_close(served, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(load_embedder(folder).embed([side])[0], served, atol=1e-6, rtol=0)
        assert before is None or (served - before).abs().max() > 1e-5
        before = served
    old = load_file(backbone / "model.safetensors")["model.embed_tokens.weight"]
    new = load_file(final / "model.safetensors")["model.embed_tokens.weight"]
    moved = ((new - old).abs().amax(1) > 0).nonzero().flatten().tolist()
    own = [loaded.mask_token_id, *loaded.compression_token_ids]  # the mask token's row is set when it is added
    assert (moved == own) if tuning == "dora" else (len(moved) > len(own))


def test_coma_in_bfloat16_with_the_whole_matrix(tiny_backbone_path, photo_data, photo_dialogues, tmp_path):
    """The matrix is trained in float32, and embeddings of the unfinished model can be taken all the same."""
    content = coma(tiny_backbone_path(), photo_data, photo_dialogues, tmp_path, dtype="bfloat16")
    content["lora"]["embeddings"] = "all"
    final = train(parse_recipe(content))
    assert {tensor.dtype for tensor in load_file(final / "model.safetensors").values()} == {torch.bfloat16}
    assert read_record(final)["merge_cosine"] > 0.999


def test_a_checkpoint_keeps_its_compression_tokens(tiny_backbone_path, photo_data, photo_dialogues, tmp_path):
    content = coma(tiny_backbone_path(), photo_data, photo_dialogues, tmp_path)
    content["stages"][1]["contrastive"]["compression_tokens"] = K + 1
    with pytest.raises(CocoaError, match=r"stages.contrastive: compression_tokens: 5, but there are 4"):
        train(parse_recipe(content))


def test_moca_embeds_the_mean_of_all_tokens(tiny_backbone_path, photo_data, pictures, tmp_path):
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path)
    joint = STEPS | {"text_mask_ratio": 0.4}
    contrastive = content["stages"][2]["contrastive"] | {"pooling": "mean", "data": {"hard_negatives": 2}}
    content["stages"] = [{"joint_reconstruction": joint}, {"contrastive": contrastive}]
    final = train(parse_recipe(content))
    assert read_record(final)["pooling"] == "mean" and read_record(final)["attention"] == "bidirectional"
    loaded = load_backbone(final, pooling="mean")
    side = Side("Find the caption:", "A red cup.", pictures[0])
    expected = torch.nn.functional.normalize(states_of(loaded, side).mean(0), dim=0)
    torch.testing.assert_close(load_embedder(final).embed([side])[0], expected, atol=1e-6, rtol=0)


def test_mntp_and_mlm_train_to_different_weights(tiny_backbone_path, photo_data, tmp_path):
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path)
    found = []
    for objective in ("mntp", "mlm"):
        stages = [{"joint_reconstruction": STEPS | {"text_objective": objective}}]
        final = train(parse_recipe(content | {"output_dir": str(tmp_path / objective), "stages": stages}))
        found.append(load_file(final / "model.safetensors")["model.embed_tokens.weight"])
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"compression_tokens": -2, "pooling": "compression"}, "compression_tokens: -2 must be above 0"),
        ({"compression_tokens": 0, "pooling": "compression"}, "compression_tokens: 0 must be above 0"),
        ({"compression_tokens": 8}, "compression_tokens: the pooling is lasttoken; leave it out, or set pooling"),
        ({"pooling": "compression"}, r"no free embedding row for .* \(23 are free\); lower compression_tokens"),
    ],
)
def test_compression_tokens_that_cannot_be_are_found_before_the_first_stage(
    tiny_backbone_path, photo_data, tmp_path, monkeypatch, options, said
):
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path)
    content["stages"][2]["contrastive"] |= options
    monkeypatch.setattr(pipeline, "run_stage", lambda *args: pytest.fail("trained before it looked"))
    with pytest.raises(CocoaError, match=rf"stages\.contrastive: .*{said}"):
        train(parse_recipe(content))


def test_compression_tokens_stay_through_a_stage_that_does_not_pool_them(tiny_backbone_path, photo_data, tmp_path):
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path)
    content["stages"].insert(0, {"compression": STEPS | {"compression_tokens": K}})
    content["stages"][3]["contrastive"]["pooling"] = "compression"
    with pytest.raises(CocoaError, match=r"stages.contrastive: compression_tokens: 32, but there are 4"):
        pipeline.stage_forms(parse_recipe(content))
    content["stages"][3]["contrastive"]["compression_tokens"] = K
    forms = pipeline.stage_forms(parse_recipe(content))
    assert [form.compression_tokens for form in forms] == [K, 0, 0, K]


def test_probes_have_the_stage_s_length(tiny_backbone_path, photo_data, tmp_path):
    """A budget beyond the default length would else end a trained stage in an error."""
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path)
    content["image"] = {"train_tokens": [4, 5000], "eval_tokens": [4, 5000]}
    content["data"]["subsets"] = ["SUN397"]
    content["stages"] = [{"contrastive": content["stages"][2]["contrastive"] | {"batch_size": 2, "max_length": 8192}}]
    assert train(parse_recipe(content)).is_dir()
