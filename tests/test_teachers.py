"""Every teacher class on a tiny random configuration, and what load_teacher says about bad input."""

import json

import pytest
import torch
import torch.nn.functional as F

from refalign_ext.teachers import (
    TEACHERS,
    DINOv3Teacher,
    QwenVisionTeacher,
    SigLIP2Teacher,
    TeacherEntry,
    load_teacher,
)

pytest.importorskip("transformers")


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=4,
        patch_size=8,
        image_size=48,
    )
    folder = tmp_path_factory.mktemp("dinov3")
    DINOv3ViTModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    """A whole SigLIP model, text tower included, as the published files are."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        text_config={
            **sizes,
            "vocab_size": 50,
            "max_position_embeddings": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    )
    folder = tmp_path_factory.mktemp("siglip")
    SiglipModel(config).save_pretrained(folder)
    return folder


def make_qwen(**changes):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 24,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        vision_config={**vision, **changes},
        text_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 60,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """A whole Qwen2.5-VL, language model included, split into several files as the published one is."""
    folder = tmp_path_factory.mktemp("qwen")
    make_qwen().save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def tiny_entries(monkeypatch):
    monkeypatch.setitem(TEACHERS, "tiny-siglip", TeacherEntry(SigLIP2Teacher, None, 32, 1))
    monkeypatch.setitem(TEACHERS, "tiny-qwen", TeacherEntry(QwenVisionTeacher, None, 24, 1))


def check_frozen(teacher, features, count, tokens, dim):
    assert features.shape == (count, tokens, dim)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert not features.is_inference()  # may be saved for the loss's backward pass
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.dim == dim


def test_dinov3_gives_the_patch_tokens(dino_folder, images):
    teacher = load_teacher("dinov3-tiny", dino_folder)
    features = teacher(images, (4, 6))
    check_frozen(teacher, features, 2, 24, 32)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    hidden = teacher.model(((images + 1) / 2 - mean) / std).last_hidden_state
    assert hidden.shape[1] == 1 + 4 + 24
    torch.testing.assert_close(features, hidden[:, 5:])
    # Normed: layer norm with its initial weight leaves every token with mean 0 and variance 1.
    torch.testing.assert_close(features.mean(-1), torch.zeros(2, 24), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(-1, correction=0), torch.ones(2, 24), atol=1e-3, rtol=0)


def test_dinov3_makes_one_patch_per_cell(dino_folder, images):
    teacher = load_teacher("dinov3-tiny", dino_folder)
    assert teacher.input_size(480, 832, (30, 52)) == (240, 416)
    assert teacher(images, (3, 5)).shape == (2, 15, 32)


def test_dinov3_tokens_are_in_raster_order(dino_folder):
    """Without mixing between tokens, a bright cell changes the feature of exactly that cell."""
    teacher = load_teacher("dinov3-tiny", dino_folder)
    for name, parameter in teacher.model.named_parameters():
        if "o_proj" in name:
            parameter.zero_()
    check_one_cell(teacher, cell=8, grid=(4, 6))


def check_one_cell(teacher, cell, grid):
    plain = torch.zeros(1, 3, grid[0] * cell, grid[1] * cell)
    spot = plain.clone()
    row, column = 2, 1
    spot[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 1.0
    change = (teacher(spot, grid) - teacher(plain, grid)).abs().amax(-1).reshape(grid)
    assert change[row, column] > 1e-3
    change[row, column] = 0
    assert change.max() < 1e-6


def test_siglip_squashes_and_resizes_its_features(siglip_folder, images, tiny_entries):
    teacher = load_teacher("tiny-siglip", siglip_folder)
    features = teacher(images, (4, 6))
    check_frozen(teacher, features, 2, 24, 32)
    square = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)
    own = teacher.model(square).last_hidden_state.unflatten(1, (4, 4))  # mean .5 and std .5 keep [-1, 1]
    expected = F.interpolate(own.permute(0, 3, 1, 2), size=(4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(features, expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(teacher(square, (4, 4)), own.flatten(1, 2))


def test_siglip_reads_only_the_vision_tower(siglip_folder, tiny_entries):
    from transformers import SiglipModel

    whole = SiglipModel.from_pretrained(siglip_folder).vision_model.state_dict()
    tower = load_teacher("tiny-siglip", siglip_folder).model.state_dict()
    tower = {key.removeprefix("vision_model."): value for key, value in tower.items()}
    assert whole.keys() == tower.keys()
    for key, value in whole.items():
        torch.testing.assert_close(tower[key], value, rtol=0, atol=0)


def test_qwen_equals_the_whole_model(qwen_folder, images, tiny_entries):
    """Patch order against the library's own image processor, features against the full model."""
    from transformers import Qwen2VLImageProcessor

    teacher = load_teacher("tiny-qwen", qwen_folder)
    features = teacher(images, (4, 6))
    check_frozen(teacher, features, 2, 24, 24)
    processor = Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False, do_rescale=False
    )
    inputs = processor(images=list((images + 1) / 2), return_tensors="pt")
    output = make_qwen().eval().model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    merged = output if isinstance(output, torch.Tensor) else output.pooler_output
    torch.testing.assert_close(features.flatten(0, 1), merged, atol=1e-5, rtol=1e-4)


def test_qwen_undoes_its_windows(tiny_entries):
    """A grid of 6 x 6 merged tokens with windows of 2 x 2: a bright cell must come out where it went in."""
    teacher = QwenVisionTeacher(make_qwen().model.visual)
    for name, parameter in teacher.model.named_parameters():
        if "attn.proj" in name:
            parameter.zero_()
    check_one_cell(teacher, cell=8, grid=(6, 6))


def test_qwen_resizes_to_whole_merged_tokens(qwen_folder, tiny_entries):
    teacher = load_teacher("tiny-qwen", qwen_folder)
    assert teacher.input_size(30, 50, (2, 3)) == (32, 48)
    assert teacher.input_size(3, 3, (1, 1)) == (8, 8)
    assert teacher(torch.zeros(1, 3, 30, 50), (2, 3)).shape == (1, 6, 24)


@pytest.mark.parametrize("name", ["dinov3-tiny", "tiny-siglip", "tiny-qwen"])
def test_bfloat16_keeps_tables_and_gives_float32(name, request, images, tiny_entries):
    fixture = {"dinov3-tiny": "dino_folder", "tiny-siglip": "siglip_folder", "tiny-qwen": "qwen_folder"}[name]
    folder = request.getfixturevalue(fixture)
    full = load_teacher(name, folder)
    half = load_teacher(name, folder, dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16
    for (key, buffer), other in zip(full.model.named_buffers(), half.model.buffers(), strict=True):
        if buffer.is_floating_point():
            torch.testing.assert_close(
                other, buffer, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}"
            )
    features = half(images, (4, 6))
    assert features.dtype == torch.float32
    assert F.cosine_similarity(features, full(images, (4, 6)), dim=-1).min() > 0.99


def test_autocast_around_the_teacher_changes_nothing(dino_folder, images):
    teacher = load_teacher("dinov3-tiny", dino_folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher(images, (4, 6))
    torch.testing.assert_close(inside, teacher(images, (4, 6)), rtol=0, atol=0)


def test_no_images(dino_folder):
    assert load_teacher("dinov3-tiny", dino_folder)(torch.zeros(0, 3, 32, 48), (4, 6)).shape == (0, 24, 32)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "message"), [("dino", "dinov3-l"), ("dinov3-tiny", "--alignment.teacher_path")]
)
def test_names_that_cannot_be_loaded(name, message):
    with pytest.raises(ValueError, match=message) as error:
        load_teacher(name)
    one_line(error)


@pytest.mark.parametrize(
    ("name", "kind", "is_gated"),
    [
        ("dinov3-l", "LocalEntryNotFoundError", True),
        ("siglip2-so400m", "LocalEntryNotFoundError", False),
        ("dinov3-b", "GatedRepoError", True),
    ],
)
def test_absent_weights_say_how_to_get_them(name, kind, is_gated, monkeypatch):
    import huggingface_hub

    def absent(repository, filename):
        error = getattr(huggingface_hub.errors, kind)
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    with pytest.raises(ValueError, match="--alignment.teacher_path") as error:
        load_teacher(name)
    message = one_line(error)
    assert TEACHERS[name].repository in message and ("hf auth login" in message) == is_gated


def test_only_the_shards_of_the_tower_are_fetched(qwen_folder, monkeypatch, tiny_entries, images):
    import huggingface_hub

    monkeypatch.setitem(TEACHERS, "tiny-qwen", TeacherEntry(QwenVisionTeacher, "somebody/tiny", 24, 1))
    fetched = []

    def local(repository, filename):
        fetched.append(filename)
        return str(qwen_folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", local)
    features = load_teacher("tiny-qwen")(images, (4, 6))
    torch.testing.assert_close(
        features, load_teacher("tiny-qwen", qwen_folder)(images, (4, 6)), rtol=0, atol=0
    )
    shards = {name for name in fetched if name.endswith(".safetensors")}
    present = {path.name for path in qwen_folder.glob("*.safetensors")}
    weight_map = json.loads((qwen_folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert shards == {shard for key, shard in weight_map.items() if key.startswith("visual.")}
    assert shards < present


def test_a_local_folder_wins(dino_folder, monkeypatch):
    import huggingface_hub

    def online(repository, filename):
        raise AssertionError("the hub must not be asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", online)
    monkeypatch.setitem(TEACHERS, "dinov3-l", TeacherEntry(DINOv3Teacher, "facebook/any", 32, 1))
    assert load_teacher("dinov3-l", dino_folder).dim == 32


def test_weights_of_another_width(dino_folder):
    with pytest.raises(ValueError, match="32 wide.*1024") as error:
        load_teacher("dinov3-l", dino_folder)
    one_line(error)


def test_bad_folders(dino_folder, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match=f"{folder}: no teacher dinov3-tiny there"):
            load_teacher("dinov3-tiny", folder)
    (tmp_path / "model.safetensors").write_bytes((dino_folder / "model.safetensors").read_bytes()[:-100])
    (tmp_path / "config.json").write_bytes((dino_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="not a readable safetensors file") as error:
        load_teacher("dinov3-tiny", tmp_path)
    one_line(error)


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_weights_that_do_not_fit(dino_folder, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    tensors = load_file(dino_folder / "model.safetensors")
    key = "norm.weight"
    if damage == "missing":
        del tensors[key]
    elif damage == "unexpected":
        tensors["another.weight"] = torch.zeros(3)
    else:
        tensors[key] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((dino_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="DINOv3ViTModel") as error:
        load_teacher("dinov3-tiny", tmp_path)
    one_line(error)


def test_bad_images(dino_folder):
    teacher = load_teacher("dinov3-tiny", dino_folder)
    with pytest.raises(ValueError, match=r"\[K, 3, H, W\]"):
        teacher(torch.zeros(3, 32, 48), (4, 6))
    with pytest.raises(ValueError, match="grid"):
        teacher(torch.zeros(1, 3, 32, 48), (0, 6))
