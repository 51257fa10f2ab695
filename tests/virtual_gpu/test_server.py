"""Jobs on virtual cards: what torch sees there, and what becomes of jobs that end badly."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_lowmem.virtual_gpu import JobFailedError, Server, VirtualGPUUnavailable, get_card, run

MIB = 2**20
GIB = 2**30
HERE = str(Path(__file__).parent)


def processes_of(server: Server) -> list[int]:
    return [parent._process.pid for parent in server._parents.values()]


def test_a_jobs_peaks_are_the_allocators_and_the_device_holds_the_context_too(job, laptop):
    result = job("matmul_step", size=1024)
    report = result.report
    assert report.peak_allocated_bytes == result.value["allocated"]
    assert report.peak_reserved_bytes == result.value["reserved"]
    assert report.peak_device_bytes == report.peak_reserved_bytes + laptop.context_bytes
    assert (report.device, report.provenance) == ("rtx-4050-laptop-6gb", "virtual")
    assert report.missing_functions == ()
    assert report.complete


def test_one_that_nobody_comes_to_close_leaves_no_folder(tmp_path):
    script = "from qlora_lowmem.virtual_gpu import Server; server = Server(); raise KeyboardInterrupt"
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert run.stderr.endswith("KeyboardInterrupt\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [256, 2048])
def test_a_job_peaks_where_a_fresh_process_does(job, laptop, size, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {HERE!r})\nimport jobs\njobs.matmul_step({size})\n")
    fresh = run([sys.executable, str(script)], laptop)
    forked = job("matmul_step", size=size).report
    assert fresh.exit_code == 0
    assert forked == fresh


def test_the_workspaces_of_the_cards_generation_are_in_the_peak(job):
    """cuBLAS takes 8,519,680 bytes a handle up to sm_89 and 32 MiB on sm_90: one for each of the two threads."""
    ada = job("matmul_step", get_card("rtx-4090-24gb"), size=512).report
    hopper = job("matmul_step", get_card("h100-80gb"), size=512).report
    assert hopper.peak_allocated_bytes - ada.peak_allocated_bytes == 2 * (32 * MIB - 8_519_680)


def test_a_peak_before_a_reset_is_not_forgotten(job):
    result = job("peak_then_reset", mib=500)
    assert result.value == 0
    assert result.report.peak_allocated_bytes == 500 * MIB


def test_what_a_backward_pass_held_is_free_when_it_returns(job):
    """The leaf, the output and its gradient, 8 MiB each, and what is taken then; the gradient of the leaf is gone."""
    assert job("peaks_while_autograds_thread_is_the_last_to_run", rounds=5).value == [3 * 8 + 64] * 5


def test_every_job_compiles_as_if_it_were_the_first(job, monkeypatch, tmp_path):
    """A warm cache of torch.compile saves the timing of kernels, and the memory that timing takes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    first, second = (Path(job("compile_cache").value) for _ in range(2))
    assert first != second
    assert not first.exists()


def test_torchs_own_out_of_memory_error_comes_at_the_cards_limit(job, laptop):
    value = job("out_of_memory", mib=512).value
    assert value["pieces"] == (laptop.total_bytes - laptop.context_bytes) // (512 * MIB)
    assert "Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 6.00 GiB" in value["message"]
    used = value["pieces"] * 512 * MIB + laptop.context_bytes
    assert value["free"] == laptop.total_bytes - used


def test_a_card_with_more_memory_holds_more(job, laptop):
    value = job("out_of_memory", laptop.with_memory(12 * GIB), mib=512).value
    assert value["pieces"] == (12 * GIB - laptop.context_bytes) // (512 * MIB)


def test_a_fraction_of_the_memory_is_a_limit(job):
    assert "1.50 GiB allowed" in job("memory_fraction").value


def test_nvml_shows_the_same_machine(job, laptop):
    value = job("nvml_and_torch").value
    assert value["before"] == 0
    assert value["used"] == value["process_used"] == value["torch_used"] == laptop.context_bytes + 100 * MIB
    assert value["total"] == laptop.total_bytes
    assert value["is_this_process"]
    assert value["name"] == laptop.title
    assert value["same_handle"] == 0


def test_values_are_zeros_and_shapes_the_worst_case(job):
    result = job("values")
    assert result.value == {
        "item": 0.0, "masked": 10, "unique": 7, "all": False, "host_copy": [0.0, 1.0, 2.0, 3.0], "pinned": True
    }  # fmt: skip
    assert result.report.values_read
    assert result.output_tail.count("not real") == 1


def test_a_program_that_reads_nothing_back_is_not_warned(job):
    result = job("matmul_step", size=64)
    assert not result.report.values_read
    assert "not real" not in result.output_tail


def test_a_copy_to_the_host_overwrites_exactly_its_range(job):
    result = job("pinned_round_trip")
    assert result.value == [7.0, 0.0, 0.0, 7.0, 7.0]
    assert result.report.peak_pinned_host_bytes >= 12 * MIB


def test_addresses_are_the_same_in_every_run_and_belong_to_no_host_memory(job):
    first, second = job("device_and_host_pointers").value, job("device_and_host_pointers").value
    assert first == second
    assert first["first"] % (2 * MIB) == 0
    assert not first["host_is_pinned"]


def test_expandable_segments_are_mapped_and_given_back(job):
    result = job("expandable_segments")
    assert result.value == {"reserved": 1000 * MIB, "after": 0, "segments": 1}
    assert result.report.missing_functions == ()


def test_managed_memory_is_counted_by_itself(job):
    result = job("managed")
    assert result.value == 0
    assert result.report.peak_managed_bytes == 5 * MIB
    assert result.report.peak_allocated_bytes == 0


@pytest.mark.parametrize(
    ("function", "name"),
    [("refused_graph", "cudaStreamBeginCapture"), ("refused_sparsity", "cusparseLtInit")],
)
def test_what_is_not_implemented_is_refused_by_name(job, function, name):
    result = job(function)
    assert result.value, "it was not refused"
    assert name in result.report.missing_functions
    assert f"the program called {name}, which is not implemented" in result.output_tail
    assert result.output_tail.count(f"called {name},") == 1


def test_a_convolution_is_planned_and_counts_what_pytorch_allocates(job):
    result = job("convolution")
    image, weight = 4 * MIB, 512
    tensors = 4 * image + 2 * weight  # image, result, gradients of both; weight and its gradient
    assert tensors <= result.value <= tensors + image
    assert result.report.missing_functions == ()


def test_refused_graphs_say_what_to_do(job):
    assert "torch.compile(mode=" in job("refused_graph").output_tail


def test_cudnn_plans_attention_with_its_frontends_own_workspace(job):
    """Its frontend asks for the queries' fp32 gradient and the softmax's sums: 4 bytes an element and a row."""
    batch, heads, seq, head_dim = 2, 16, 1024, 128
    options = {"batch": batch, "heads": heads, "seq": seq, "head_dim": head_dim}
    value = job("attention", get_card("h100-80gb"), backend="CUDNN_ATTENTION", **options).value
    tensor, row = 2 * batch * heads * seq * head_dim, 4 * batch * heads * seq
    assert tensor + row <= value["kept"] <= tensor + row + 2048  # the output, the log of the sums, two random numbers
    gradients = 4 * tensor  # of the output, which is passed in, and of the three inputs
    workspace = 2 * tensor + row
    assert 0 <= value["peak"] - value["kept"] - gradients - workspace <= 4096


@pytest.mark.parametrize(
    ("card", "function"),
    [
        ("rtx-4050-laptop-6gb", "ScaledDotProductFlashAttentionBackward0"),
        ("a100-40gb", "ScaledDotProductFlashAttentionBackward0"),
        ("h100-80gb", "ScaledDotProductCudnnAttentionBackward0"),
    ],
)
def test_attention_is_the_cards_default(job, card, function):
    assert job("default_attention", get_card(card)).value == function


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_networks_weights_fill_their_buffer(job, kind):
    value = job("recurrent", kind=kind).value
    assert value["spanned"] == value["counted"]


@pytest.mark.parametrize("name", ["rtx-2060-6gb", "rtx-4050-laptop-6gb", "h100-80gb"])
def test_torch_sees_the_card(job, name):
    card = get_card(name)
    assert job("properties", card).value == {
        "name": card.title,
        "capability": list(card.compute_capability),
        "total": card.total_bytes,
        "sms": card.sm_count,
        "bf16": card.supports_bf16,
    }


def test_a_job_knows_its_card(job, laptop):
    assert job("card").value == f"rtx-4050-laptop-6gb {laptop.total_bytes}"
    assert job("card", laptop.with_memory(8 * GIB)).value == f"rtx-4050-laptop-6gb {8 * GIB}"


def test_an_exception_is_a_result(server, laptop):
    result = server.submit("virtual_gpu.jobs:fail", {"message": "as it should"}, laptop).result(60)
    assert (result.exit_code, result.error) == (1, "ValueError: as it should")
    assert "Traceback" in result.output_tail


def test_a_job_may_choose_its_exit_code(job):
    assert job("leave", code=7).exit_code == 7


def test_a_killed_job_still_has_its_devices_peak_and_the_next_one_runs(server, laptop, job):
    result = server.submit("virtual_gpu.jobs:kill_itself", {}, laptop).result(60)
    assert (result.exit_code, result.signal) == (137, 9)
    assert result.report.peak_device_bytes == laptop.context_bytes + 300 * MIB
    assert not result.report.complete
    assert job("matmul_step", size=64).exit_code == 0


@pytest.mark.parametrize("timeout", [0, 1])
def test_a_job_over_its_time_is_killed(server, laptop, job, timeout):
    start = time.monotonic()
    result = server.submit("virtual_gpu.jobs:hold_and_sleep", {"seconds": 60}, laptop, timeout=timeout).result(60)
    assert result.timed_out
    assert result.exit_code == 137
    assert time.monotonic() - start < 20
    assert job("matmul_step", size=64).exit_code == 0


def test_a_job_that_is_not_a_function_is_refused(server, laptop):
    with pytest.raises(ValueError, match=r"package\.module:function"):
        server.submit("virtual_gpu.jobs", {}, laptop)
    result = server.submit("virtual_gpu.jobs:nothing", {}, laptop).result(60)
    assert result.exit_code == 1
    assert "nothing" in (result.error or "")


@pytest.mark.usefixtures("built")
def test_a_server_that_dies_fails_its_jobs_and_a_new_one_takes_over(laptop):
    with Server(max_workers=2) as server:
        first = server.submit("virtual_gpu.jobs:hold_and_sleep", {"seconds": 60}, laptop)
        second = server.submit("virtual_gpu.jobs:kill_the_parent", {}, laptop)
        with pytest.raises(JobFailedError, match="ended with -9"):
            second.result(60)
        with pytest.raises(JobFailedError):
            first.result(60)
        assert server.submit("virtual_gpu.jobs:card", {}, laptop).result(60).exit_code == 0


@pytest.mark.usefixtures("built")
def test_a_module_that_cannot_be_imported_fails_the_job(laptop):
    with (
        Server(["no_such_module"]) as server,
        pytest.raises(JobFailedError, match="ModuleNotFoundError: No module named 'no_such_module'"),
    ):
        server.submit("virtual_gpu.jobs:card", {}, laptop).result(60)


@pytest.mark.usefixtures("built")
def test_a_module_that_initialises_cuda_is_refused(laptop, tmp_path, monkeypatch):
    (tmp_path / "eager_module.py").write_text("import torch; torch.ones(1, device='cuda')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with Server(["eager_module"]) as server, pytest.raises(JobFailedError, match="eager_module initialises CUDA"):
        server.submit("virtual_gpu.jobs:card", {}, laptop).result(60)


@pytest.mark.usefixtures("built")
def test_closing_leaves_no_process_and_no_file(laptop):
    server = Server(max_workers=1)
    running = server.submit("virtual_gpu.jobs:hold_and_sleep", {"seconds": 60}, laptop)
    waiting = server.submit("virtual_gpu.jobs:card", {}, laptop)
    while not processes_of(server):
        time.sleep(0.01)
    folder, (process,) = server._folder, processes_of(server)
    server.close()
    for future in (running, waiting):
        with pytest.raises(JobFailedError, match="closed"):
            future.result(10)
    assert not folder.exists()
    assert not Path(f"/proc/{process}").exists()
    with pytest.raises(RuntimeError, match="closed"):
        server.submit("virtual_gpu.jobs:card", {}, laptop)


def test_a_result_that_json_cannot_hold_is_an_error(server, laptop):
    result = server.submit("virtual_gpu.jobs:not_json", {}, laptop).result(60)
    assert result.exit_code == 1
    assert "not JSON serializable" in (result.error or "")


def test_where_no_virtual_gpu_can_be_the_future_says_so(laptop, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with Server() as server, pytest.raises(VirtualGPUUnavailable, match="no-such-compiler"):
        server.submit("virtual_gpu.jobs:card", {}, laptop).result(60)
