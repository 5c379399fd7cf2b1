"""Which file of a folder counts: what transformers would load."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import compute_logits, load_tiny_stage
from transformers import AutoModelForCausalLM

from dist_int8.checkpoint import CheckpointReader
from dist_int8.checkpoint.weight_files import INDEX, PICKLE_SINGLE, SINGLE
from dist_int8.checkpoint.writer import quantize
from dist_int8.models import notice

IDS = torch.arange(3, 40)


def save_again(folder, seed=1, **options):
    """Save other weights into the folder with transformers, as a second run of a script does."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if options:  # in shards
        (folder / SINGLE).unlink()
    model.save_pretrained(folder, **options)


def assert_loads_as_transformers(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(IDS[None]).logits[0]
    logits = compute_logits(load_tiny_stage(folder, int8=False, **options), IDS)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def warn_again():
    notice.warn_once.cache_clear()


def test_a_single_file_comes_before_the_index_that_an_older_save_left(folder_of, caplog):
    folder = folder_of("llama")
    save_again(folder, max_shard_size="40KB")
    shards = {path.name: path.read_bytes() for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1 and not (folder / SINGLE).exists()
    save_again(folder, seed=2)  # removes the shards, leaves the index
    assert (folder / INDEX).exists()
    assert_loads_as_transformers(folder)
    assert f"{SINGLE}, as in transformers; {INDEX} is passed over" in caplog.text
    assert caplog.text.count("passed over") == 1  # though opened several times
    for name, content in shards.items():
        (folder / name).write_bytes(content)
    assert_loads_as_transformers(folder)


def test_an_older_single_file_comes_before_newer_shards_as_in_transformers(folder_of, caplog):
    folder = folder_of("llama")
    single = (folder / SINGLE).read_bytes()
    save_again(folder, max_shard_size="40KB")
    (folder / SINGLE).write_bytes(single)
    assert_loads_as_transformers(folder)
    assert f"{INDEX} is passed over" in caplog.text


def test_the_rewritten_checkpoint_has_the_weights_that_count(folder_of, tmp_path):
    folder = folder_of("llama")
    save_again(folder, max_shard_size="40KB")
    save_again(folder, seed=2)
    quantize(folder, tmp_path / "int8").run()
    (folder / INDEX).unlink()
    quantize(folder, tmp_path / "again").run()
    for name in load_file(tmp_path / "again" / "model-00001-of-00001.safetensors"):
        one, two = (CheckpointReader(tmp_path / out).read(name) for out in ("int8", "again"))
        assert torch.equal(one, two)


def test_shards_of_another_save_do_not_count(folder_of):
    folder = folder_of("llama")
    save_again(folder, max_shard_size="40KB")
    stale = {name: torch.full((3, 3), 7.0) for name in ("model.norm.weight", "stale.weight")}
    save_file(stale, folder / "model-00001-of-00099.safetensors")
    assert_loads_as_transformers(folder)
    assert "stale.weight" not in CheckpointReader(folder)


def test_tensors_of_the_shards_count_even_where_the_index_forgets_them(folder_of):
    folder = folder_of("llama")
    save_again(folder, max_shard_size="40KB")
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert_loads_as_transformers(folder)


def test_safetensors_come_before_pickles_even_where_those_are_allowed(folder_of, caplog):
    folder = folder_of("llama")
    pickled = {name: tensor + 1 for name, tensor in load_file(folder / SINGLE).items()}
    torch.save(pickled, folder / PICKLE_SINGLE)
    assert_loads_as_transformers(folder)
    assert not caplog.text  # both are usual in one folder
    assert_loads_as_transformers(folder, allow_pickle=True)
    assert f"{PICKLE_SINGLE} is passed over" in caplog.text


def test_a_single_pickle_comes_before_its_index(folder_of):
    folder = folder_of("llama")
    torch.save(load_file(folder / SINGLE), folder / PICKLE_SINGLE)
    (folder / SINGLE).unlink()
    (folder / f"{PICKLE_SINGLE}.index.json").write_text('{"weight_map": {"x": "gone.bin"}}')
    load_tiny_stage(folder, allow_pickle=True)


def test_the_file_that_the_config_names_is_taken(folder_of, tmp_path):
    folder = folder_of("llama")
    (folder / SINGLE).rename(folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "transformers_weights": "other.safetensors"})
    )
    assert_loads_as_transformers(folder)
    quantize(folder, tmp_path / "int8").run()
    load_tiny_stage(tmp_path / "int8")  # whose files have other names
    for named in ("../other.safetensors", "weights.bin", 3):
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
        with pytest.raises(ValueError, match=r"config\.json:transformers_weights: must be the nam"):
            CheckpointReader(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", r"got model\.fp16\.safetensors, a name that transformers does"),
        ("llama.Q4_K_M.gguf", r"got llama\.Q4_K_M\.gguf \(a format of llama\.cpp\)"),
        ("tf_model.h5", r"got tf_model\.h5 \(weights of TensorFlow\)"),
        ("consolidated.00.pth", r"got consolidated\.00\.pth \(a pickle of the original release\)"),
    ],
)
def test_weights_in_other_files_are_named_with_what_to_do(folder_of, name, message):
    folder = folder_of("llama")
    (folder / SINGLE).rename(folder / name)
    with pytest.raises(ValueError, match=message) as error:
        CheckpointReader(folder)
    assert "\n" not in str(error.value)


def test_weights_that_git_lfs_did_not_fetch_are_named(folder_of):
    folder = folder_of("llama")
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=rf"{SINGLE} is a pointer of git-lfs: run `git lfs pull`"):
        CheckpointReader(folder)


def test_a_link_to_a_file_that_is_gone_is_named(folder_of):
    folder = folder_of("llama")
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("/nowhere/blobs/1")
    with pytest.raises(ValueError, match=f"a link to a file that is gone; download {SINGLE} again"):
        CheckpointReader(folder)


def test_only_rank_0_warns(folder_of, monkeypatch, caplog):
    folder = folder_of("llama")
    (folder / INDEX).write_text('{"weight_map": {}}')
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.WARNING):
        CheckpointReader(folder)
    assert not caplog.text
