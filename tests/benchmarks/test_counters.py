"""What is read from Nsight Compute's CSV."""

import counters
from records import Records, read

HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
SMALL = "void dist_int8::(anonymous namespace)::int8_matmul_small_kernel<__nv_bfloat16, 1>(Args)"
MARK = "void at::native::distribution_elementwise_grid_stride_kernel<exponential_kernel>(long)"
CUTLASS = (
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int>, "
    "MainloopSm90TmaGmmaWarpSpecialized<4, cute::tuple<cute::C<2>, cute::C<1>, cute::C<1>>, "
    "KernelTmaWarpSpecializedCooperative>, cute::tuple<cute::C<256>, cute::C<128>, cute::C<128>>>"
    "(Params)"
)


def row(number, kernel, metric, value, unit=""):
    context = '"1","7","(256, 1, 1)","(128, 1, 1)","0","9.0","Command line profiler metrics"'
    return f'"{number}","99","python","host","{kernel}",{context},"{metric}","{unit}","{value}"'


def output(*rows):
    first = ["profiled: nothing", "==PROF== Connected to process 99 (/usr/bin/python3.12)", HEADER]
    return "\n".join([*first, *rows])


def test_counters_have_one_record_per_kernel():
    tensor_pipe = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
    small, cutlass = counters.parse(
        output(
            row(0, SMALL, "gpu__time_duration.sum", "1,234.50", "ns"),
            row(0, SMALL, "dram__throughput.avg.pct_of_peak_sustained_elapsed", "81.25", "%"),
            row(0, SMALL, "a.metric.that.nobody.asked.for", "1"),
            row(1, CUTLASS, "gpu__time_duration.sum", "200000", "ns"),
            row(1, CUTLASS, tensor_pipe, "n/a"),
            row(1, CUTLASS, "launch__registers_per_thread", "168"),
        )
    )
    assert small["kernel"] == "int8_matmul_small_kernel"
    assert (small["ns"], small["of_bandwidth_pct"]) == (1234.5, 81.25)
    assert cutlass == {
        "launch": 1,
        "kernel": "cutlass 256x128x128",
        "ns": 200000.0,
        "of_tensor_pipe_pct": None,
        "registers": 168.0,
    }


def test_kernel_belongs_to_the_call_of_the_preceding_mark():
    launches = [SMALL, MARK, SMALL, CUTLASS, MARK, SMALL]
    rows = [row(i, name, "gpu__time_duration.sum", "1") for i, name in enumerate(launches)]
    found = counters.by_call(counters.parse(output(*rows)), ["decode", "prefill"])
    assert [(kernel["call"], kernel["launch"]) for kernel in found] == [
        ("decode", 0),
        ("decode", 1),
        ("prefill", 0),
    ]


def test_kernels_without_marks_are_kept():
    found = counters.by_call(counters.parse(output(row(0, SMALL, "dram__bytes.sum", "1"))), ["a"])
    assert [kernel["call"] for kernel in found] == ["unknown"]


def ncu(tmp_path, monkeypatch, script):
    """Exit status of the step beside a program in the place of Nsight Compute."""
    program = tmp_path / "ncu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(counters, "find_ncu", lambda: str(program))
    return counters.profile(Records(tmp_path / "results.jsonl", "counters"), small=True)


def test_exit_status_follows_from_ncu_messages(tmp_path, monkeypatch):
    rows = [HEADER, row(0, MARK, "dram__bytes.sum", "1"), row(1, SMALL, "dram__bytes.sum", "2")]
    csv = "\n".join(rows)
    assert ncu(tmp_path, monkeypatch, f"cat <<'E'\n{csv}\nE") == 0
    kernels = read(tmp_path / "results.jsonl")
    assert [(k["call"], k["bytes"]) for k in kernels] == [("decode linear", 2.0)]
    assert ncu(tmp_path, monkeypatch, f"cat <<'E'\n{csv}\nE\nexit 1") == 1
    assert ncu(tmp_path, monkeypatch, "echo 'Failed to find metric'; exit 9") == 1
    assert ncu(tmp_path, monkeypatch, "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1") == 77


def test_output_without_counters_has_no_records():
    assert counters.parse("==ERROR== ERR_NVGPUCTRPERM") == []
    assert counters.parse("") == []
