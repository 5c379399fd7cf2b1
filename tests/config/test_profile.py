"""A measured profile: complete, or the field that is missing is named."""

from dataclasses import asdict

import pytest

from dist_int8.config.profile import ProfileSettings
from dist_int8.partition import PROFILES


def test_a_profile_of_an_earlier_bench_is_to_be_measured_again():
    values = asdict(PROFILES["h100"])
    ProfileSettings.from_values(values, "h100.yaml")
    del values["launch_s"]
    with pytest.raises(ValueError, match=r"^h100.yaml:launch_s: launch_s must be given.*bench"):
        ProfileSettings.from_values(values, "h100.yaml")
