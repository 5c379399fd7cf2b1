"""Real launchers on several machines (network namespaces) give the text of one process.

`make test-multi-node` prints for each: launcher, command, hosts, text, seconds.
"""

import json
import shlex
import sys
import time
from pathlib import Path

import pytest
from hosts import SSH_PORT, Network
from needs import missing

import dist_int8

ROOT = Path(__file__).parents[2]
PROMPTS = ["The capital of France is", "Once upon a time"]
SCRIPT = "launch/generate.py"
FLAGS = ["--device", "cpu", "--threads", "1", "--json", "--max-tokens", "192"]
LAUNCH_TIMEOUT_S = 120
NUM_NEW = 8
STEP_TIMEOUT_S = 5.0


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    why = missing()
    if why:
        pytest.fail(f"multi-node test not run: {why}", pytrace=False)
    made = Network(3, tmp_path_factory.mktemp("network"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """The texts of one process with one stage."""
    with dist_int8.load(tiny_llama, devices=["cpu"], max_tokens=192, progress=False) as model:
        texts = [answer.text for answer in model.generate(PROMPTS, max_new_tokens=NUM_NEW)]
    say("one process", 'dist_int8.load(model, devices=["cpu"])', ["this one"], texts)
    return texts


@pytest.fixture(scope="module")
def hostfile(network, tmp_path_factory):
    file = tmp_path_factory.mktemp("hostfile") / "hostfile"
    file.write_text("".join(f"{host.name} slots=2\n" for host in network.hosts))
    return str(file)


def flags(model, num_new=NUM_NEW):
    prompts = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    return ["--model", str(model), *FLAGS, "-n", str(num_new), *prompts]


def say(launcher, command, hosts, text, seconds=None):
    took = "" if seconds is None else f"\n    seconds {seconds:.1f}"
    print(
        f"\n  {launcher}\n    command {command}\n    hosts   {', '.join(hosts)}"
        f"\n    text    {text!a}{took}",
        flush=True,
    )


def run(launcher, hosts, commands, **variables):
    """Runs a command on each host at once; the texts that rank 0 printed."""
    started = time.monotonic()
    running = [
        host.start(command, **{name: value[index] for name, value in variables.items()})
        for index, (host, command) in enumerate(zip(hosts, commands, strict=True))
    ]
    try:
        outputs = [process.communicate(timeout=LAUNCH_TIMEOUT_S) for process in running]
    finally:
        for host in hosts:
            host.kill_all()
    seconds = time.monotonic() - started
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, "\n".join(output)
    texts = []
    for line in "\n".join(stdout for stdout, _ in outputs).split("\n"):
        _, key, rest = line.partition('{"prompt"')  # pdsh puts the host's name in front
        if key:
            texts.append(json.loads(key + rest)["text"])
    shown = shlex.join(map(str, commands[0]))
    if "bash" in commands[0]:  # a script says what it runs
        shown = outputs[0][1].split("\n")[0].strip()
    say(launcher, shown, [host.name for host in hosts], texts, seconds)
    return texts


def script(name, model, **knobs):
    """launch/NAME with its knobs; the first line on its stderr is the launcher's command."""
    given = {"MODEL": str(model), "DEVICE": "cpu", "MAX_NEW_TOKENS": str(NUM_NEW), **knobs}
    settings = [f"{key}={value}" for key, value in given.items()]
    prompts = ["--prompt", PROMPTS[1], "--threads", "1", "--json", "--max-tokens", "192"]
    return ["env", *settings, f"PROMPT={PROMPTS[0]}", "bash", f"launch/{name}", *prompts]


def no_ssh(hostfile, hosts, port):
    """On every host: its number, and which hosts of the file take part, with one rank each."""
    include = "@".join(f"{host.name}:0" for host in hosts)
    shared = ["--include", include, "--master_addr", hosts[0].address, "--master_port", port]
    return [
        ["deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", str(i), *shared]
        for i in range(len(hosts))
    ]


def test_deepspeed_over_ssh(network, hostfile, tiny_llama, expected):
    """The hostfile has three hosts with two slots each; one slot of two of them is taken."""
    knobs = {"HOSTFILE": hostfile, "INCLUDE": "host-0:0@host-1:1"}
    command = script("hostfile.sh", tiny_llama, MASTER_ADDR=network.hosts[0].address, **knobs)
    assert run("deepspeed, pdsh over ssh", network.hosts[:1], [command]) == expected


def test_deepspeed_without_ssh(network, hostfile, tiny_llama, expected):
    """MASTER_ADDR is the name of the file's first host."""
    knobs = {"HOSTFILE": hostfile, "INCLUDE": "host-0:0@host-1:0", "NO_SSH": "1"}
    commands = [script("hostfile.sh", tiny_llama, NODE_RANK=str(i), **knobs) for i in range(2)]
    assert run("deepspeed --no_ssh", network.hosts[:2], commands) == expected


def test_torchrun(network, tiny_llama, expected):
    knobs = {"NUM_NODES": "2", "NUM_STAGES": "1", "ENDPOINT": "host-0:29502"}
    commands = [script("torchrun.sh", tiny_llama, **knobs)] * 2
    assert run("torchrun, c10d", network.hosts[:2], commands) == expected


def srun(launcher, hosts, command, job):
    """One task on each host, with what srun gives it and nothing else."""
    num = len(hosts)
    return run(
        launcher,
        hosts,
        [command] * num,
        SLURM_JOB_ID=[job] * num,
        SLURM_STEP_NODELIST=[f"host-[0-{num - 1}]"] * num,
        SLURM_STEP_TASKS_PER_NODE=[f"1(x{num})"] * num,
        SLURM_NTASKS=[str(num)] * num,
        SLURM_PROCID=[str(i) for i in range(num)],
        SLURM_NODEID=[str(i) for i in range(num)],
        SLURM_LOCALID=["0"] * num,
    )


def test_srun_on_three_hosts(network, tiny_llama, expected):
    command = [sys.executable, SCRIPT, *flags(tiny_llama)]
    assert srun("srun (its environment)", network.hosts, command, "29503") == expected


def connect_s(host, other):
    """Seconds of one round trip."""
    code = (
        "import socket, time; started = time.monotonic(); "
        f"socket.create_connection(({other.address!r}, {SSH_PORT})); "
        "print(time.monotonic() - started)"
    )
    return float(host.run(sys.executable, "-c", code))


def test_three_hosts_with_20_ms_between_them(network, tiny_llama, expected):
    command = [sys.executable, SCRIPT, *flags(tiny_llama)]
    with network.delay(0.02):
        assert connect_s(network.hosts[0], network.hosts[2]) >= 0.04
        launcher = "srun (its environment), 20 ms from host to host"
        assert srun(launcher, network.hosts, command, "29504") == expected


def test_a_link_cut_while_tokens_come(network, hostfile, tiny_llama):
    """The caller gets an error that names the rank; on both hosts everything ends, and not well."""
    hosts = network.hosts[:2]
    endless = [
        "--no_local_rank",
        "tests/multi_node/endless.py",
        str(tiny_llama),
        str(STEP_TIMEOUT_S),
    ]
    commands = [[*launcher, *endless] for launcher in no_ssh(hostfile, hosts, "29505")]
    running = [host.start(command) for host, command in zip(hosts, commands, strict=True)]
    try:
        while "token" not in (line := running[0].stdout.readline()):
            assert line, running[0].communicate()[1]
        cut = time.monotonic()
        network.cut(hosts[1])
        outputs = [process.communicate(timeout=60) for process in running]
        ended_s = time.monotonic() - cut
        left = [host.processes() for host in hosts]
    finally:
        network.restore(hosts[1])
        for host in hosts:
            host.kill_all()
    got = json.loads(next(x for x in outputs[0][0].splitlines() if x.startswith("{")))
    noticed_s = got.pop("when") - cut
    say(
        "deepspeed --no_ssh, link of host-1 cut while decoding",
        shlex.join(commands[0]),
        [host.name for host in hosts],
        f"{got}, exit codes {[process.returncode for process in running]}",
        noticed_s,
    )
    assert got["type"] == "RankLostError" and got["rank"] == 1 and "rank 1" in got["message"], got
    assert noticed_s < STEP_TIMEOUT_S + 5 and ended_s < STEP_TIMEOUT_S + 15
    assert all(process.returncode for process in running), outputs
    assert left == [{}, {}]
