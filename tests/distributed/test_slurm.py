"""srun's variables become a launcher's; outside of a step of srun nothing is touched."""

import pytest

from dist_int8.distributed import slurm

# As srun sets them for task 2 of `srun --ntasks 3` on two nodes.
STEP = {
    "SLURM_JOB_ID": "4217",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
LAUNCHER = {
    "RANK": "2",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "gpu03",
    "MASTER_PORT": "19217",
}


def test_a_task_of_srun_is_a_rank():
    assert slurm.as_launcher(STEP) == LAUNCHER


def test_an_address_that_is_set_stays():
    given = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
    assert slurm.as_launcher(STEP | given) == LAUNCHER | given


def test_on_one_node_the_ranks_meet_on_loopback():
    step = STEP | {"SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0"}
    found = slurm.as_launcher(step)
    assert found["MASTER_ADDR"] == "127.0.0.1" and found["LOCAL_WORLD_SIZE"] == "3"


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "0"},  # another launcher inside the job
        {"SLURM_STEP_TASKS_PER_NODE": "1"},  # srun --pty of a shell
    ],
)
def test_an_environment_that_is_no_srun_task_is_left_alone(change):
    assert slurm.as_launcher(STEP | change) == {}


def test_a_batch_script_is_a_plain_session():
    batch = {name: value for name, value in STEP.items() if not name.startswith("SLURM_STEP")}
    assert slurm.as_launcher(batch | {"SLURM_PROCID": "0"}) == {}


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[03-05,9],login", "gpu03"),
        ("rack[1-2]n[4,7-9],x[1-3]", "rack1n4"),
        ("n[08]-ib", "n08-ib"),
    ],
)
def test_first_host_of_a_node_list(nodelist, first):
    assert slurm.first_host(nodelist) == first


@pytest.mark.parametrize("text", ["", "2(x)", "two", "2(x2"])
def test_counts_that_srun_does_not_write_are_refused(text):
    with pytest.raises(ValueError, match=r"SLURM_STEP_TASKS_PER_NODE must be like 2\(x2\),1, got"):
        slurm.as_launcher(STEP | {"SLURM_STEP_TASKS_PER_NODE": text})


def test_counts_of_many_nodes():
    assert slurm.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
