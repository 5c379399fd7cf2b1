"""configs/... is found from any working directory, and a folder of the user's own goes first."""

from pathlib import Path

from dist_int8.config import find_shipped, load_settings

CONFIGS = Path(__file__).parents[2] / "configs"


def test_shipped_config_is_found_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_shipped("configs/models/bloom-176b") == CONFIGS / "models/bloom-176b"
    assert load_settings("configs/cpu-2-stages.yaml") == load_settings(
        CONFIGS / "cpu-2-stages.yaml"
    )


def test_file_of_the_working_directory_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("configs/models/bloom-176b")
    own.mkdir(parents=True)
    assert find_shipped(own) == own


def test_other_paths_and_hub_ids_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("bigscience/bloom", "configs/none.yaml", "/configs/models/bloom-176b", ""):
        assert find_shipped(path) == path
