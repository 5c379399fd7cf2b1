"""Named points of accuracy: what each stands for, and what stands beside it."""

import pytest

from dist_int8.config import Settings, load_settings
from dist_int8.config.accuracy import POINTS, Chosen, Numerics
from dist_int8.int8.checks import OUTLIER_RULES
from dist_int8.int8.rotation import LARGEST_ROTATION, check_rotation


def numerics(stored_rotation=None, **settings):
    return load_settings(**settings).resolve_numerics(stored_rotation)


def test_the_points():
    assert numerics() == numerics(accuracy="balanced") == Numerics(64, "none", 0.0, 16)
    assert numerics(accuracy="accurate") == Numerics(64, "all", 0.0, 16)
    assert numerics(accuracy="paper") == Numerics(0, "absolute", 6.0, 0)


@pytest.mark.parametrize("name", POINTS)
def test_a_setting_beside_a_point_changes_that_alone(name):
    point = numerics(accuracy=name)
    other = numerics(accuracy=name, num_hot_columns=48)
    assert other == Numerics(point.rotation, point.outlier_rule, point.outlier_threshold, 48)
    other = numerics(accuracy=name, outlier_rule="row_rms")
    assert other == Numerics(point.rotation, "row_rms", 4.0, point.num_hot_columns)
    other = numerics(accuracy=name, outlier_rule="row_rms", outlier_threshold=5.0)
    assert other == Numerics(point.rotation, "row_rms", 5.0, point.num_hot_columns)
    if name != "paper":
        assert numerics(accuracy=name, rotation=128).rotation == 128


def test_a_threshold_of_0_says_what_the_rule_none_does():
    assert numerics(outlier_threshold=0.0) == numerics()


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"outlier_rule": "absolute"}, "must have weights that are not rotated, got rotation 64"),
        ({"accuracy": "paper", "rotation": 16}, "that are not rotated, got rotation 16"),
        ({"accuracy": "paper", "stored_rotation": 32}, "that are not rotated, got rotation 32"),
        ({"outlier_rule": "none", "outlier_threshold": 5.0}, "rule has none"),
        ({"accuracy": "accurate", "outlier_threshold": 0.0}, "rule has none"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(settings, part):
    with pytest.raises(ValueError, match=part):
        numerics(**settings)


def test_weights_that_are_not_rotated_have_dynamic_outliers():
    for found in (numerics(rotation=0), numerics(stored_rotation=0)):
        assert found == Numerics(0, "row_rms", 4.0, 16)
    assert numerics(stored_rotation=0, outlier_threshold=6.0).outlier_threshold == 6.0
    assert numerics(stored_rotation=32) == Numerics(32, "none", 0.0, 16)
    assert numerics(stored_rotation=0, outlier_rule="none").outlier_rule == "none"
    assert numerics(stored_rotation=0, accuracy="accurate").outlier_rule == "all"


def test_what_is_resolved_resolves_to_itself():
    for name in POINTS:
        found = numerics(accuracy=name)
        values = {key: getattr(found, key) for key in ("rotation", "outlier_rule")}
        values |= {"outlier_threshold": found.outlier_threshold}
        assert numerics(accuracy=name, num_hot_columns=found.num_hot_columns, **values) == found


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"accuracy": "best"}, "'balanced', 'accurate' or 'paper', got 'best'"),
        ({"rotation": 48}, "rotation must be 0 or a power of two from 2 to 1024, got 48; 64 is"),
        ({"rotation": 2048}, "rotation must be 0 or a power of two from 2 to 1024, got 2048"),
        ({"rotation": -2}, "rotation must be 0 or a power of two from 2 to 1024, got -2"),
        ({"rotation": True}, "rotation must be an integer, got True"),
        (
            {"accuracy": "paper", "calibrate": "random"},
            "calibrate: calibrate must be off with accuracy paper, which has no hot columns",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(settings, part):
    with pytest.raises(ValueError) as error:
        load_settings(**settings)
    assert part in str(error.value)


def test_a_threshold_without_a_rule_is_refused():
    settings = load_settings(outlier_threshold=4.0)
    with pytest.raises(ValueError, match=r"must be left out where the rule has none .*got 4;"):
        settings.resolve_numerics(None)
    with pytest.raises(ValueError, match="accuracy must be one of balanced, accurate, paper, got"):
        Chosen(accuracy="of a later release").resolve()


def test_the_bounds_are_those_of_the_ops():
    """config imports nothing of ours, so it has them a second time."""
    for rotation in (*range(1100), 2 * LARGEST_ROTATION):
        if rotation & (rotation - 1) == 0 and rotation != 1 and rotation <= LARGEST_ROTATION:
            Settings(rotation=rotation)
            check_rotation(rotation)
            continue
        for check in (lambda size: Settings(rotation=size), check_rotation):
            with pytest.raises(ValueError, match="power of two from 2 to 1024"):
                check(rotation)
    for rule in OUTLIER_RULES:
        assert Settings(outlier_rule=rule, rotation=0).numerics.outlier_rule == rule
