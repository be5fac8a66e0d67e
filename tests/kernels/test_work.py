"""Formats of products, GPUs, and what a roofline allows."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.errors import KernelError, UnknownNameError
from quantkit.kernels.build import jobs_of, usual_works
from quantkit.kernels.compile import ARCHITECTURES
from quantkit.kernels.families import FAMILIES, architectures, best_family
from quantkit.kernels.gemm_family import GemmFamily
from quantkit.kernels.gpus import GPUS, describe_gpu, find_gpu, get_gpu
from quantkit.kernels.heuristics import Tile
from quantkit.kernels.work import FORMATS, Work, get_gemm_format

SIZES = st.integers(1, 20_000)


def test_four_bits_are_half_of_eight_and_their_scales() -> None:
    eight, four = (Work(m=1, n=4096, k=4096, format=name) for name in ("w8a16", "int4"))
    weights, scales = 4096 * 4096, 4096 * 4096 / 128 * 2
    assert eight.size_bytes - four.size_bytes == weights / 2 - scales


def test_a_group_of_ones_own_counts_its_scales() -> None:
    coarse, fine = (Work(m=1, n=64, k=1024, format="int4", group=g) for g in (128, 32))
    assert fine.size_bytes - coarse.size_bytes == 64 * (1024 / 32 - 1024 / 128) * 2


@given(
    m=SIZES, n=SIZES, k=SIZES, name=st.sampled_from(sorted(FORMATS)), gpu=st.sampled_from(list(GPUS.values()))
)
def test_the_roofline_is_under_both_ceilings(m, n, k, name, gpu) -> None:
    work = Work(m=m, n=n, k=k, format=name)
    time_us, bound = work.roofline(gpu)
    assert work.size_bytes / time_us * 1e-3 <= gpu.dram_gb_per_s * (1 + 1e-9)
    assert work.operations / time_us * 1e-6 <= max(gpu.peak_tflops.values()) * (1 + 1e-9)
    assert bound in ("memory", "compute")


def test_one_token_is_bound_by_memory_and_a_large_batch_by_compute() -> None:
    h200 = get_gpu("h200")
    assert Work(m=1, n=8192, k=8192, format="int8").roofline(h200)[1] == "memory"
    time_us, bound = Work(m=8192, n=8192, k=8192, format="int8").roofline(h200)
    assert bound == "compute"
    assert time_us == pytest.approx(2 * 8192**3 / 1979e12 * 1e6)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
    ],
)
def test_drivers_names_are_understood(written: str, name: str) -> None:
    found = find_gpu(written)
    assert found is not None
    assert found.name == name


def test_an_unknown_gpu_names_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"voodoo2: no GPU known here; choose one of .*h200"):
        get_gpu("voodoo2")
    with pytest.raises(UnknownNameError, match=r"int5: no format of a product; choose one of int8, fp8"):
        get_gemm_format("int5")
    assert get_gemm_format("w4a16").name == "int4"


def test_ceilings_of_a_gpu_that_no_sheet_is_here_of_come_from_its_clocks() -> None:
    like_h200 = describe_gpu(
        "NVIDIA H2000",
        "sm_90a",
        multiprocessors=132,
        clock_khz=1_830_000,
        memory_khz=3_201_000,
        bus_bits=6144,
    )
    h200 = get_gpu("h200")
    assert like_h200.name == "h2000"
    assert like_h200.peak_tflops["int8"] == pytest.approx(h200.peak_tflops["int8"], rel=0.01)
    assert like_h200.dram_gb_per_s == pytest.approx(h200.dram_gb_per_s, rel=0.05)
    same_name = describe_gpu(
        "NVIDIA H200", "sm_90a", multiprocessors=132, clock_khz=1, memory_khz=1, bus_bits=1
    )
    assert same_name is h200


def test_the_time_model_of_the_h200_is_the_measured_one() -> None:
    from quantkit.kernels.heuristics import H200

    model = get_gpu("h200").time_model()
    assert model == H200


# ---- families ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_no_family_is_predicted_to_be_faster_than_the_roofline(family) -> None:
    for gpu in GPUS.values():
        for name in FORMATS:
            for m in (1, 64, 4096):
                work = Work(m=m, n=4096, k=4096, format=name)
                if family.takes(work, gpu):
                    told = family.predict(work, gpu)
                    assert told.time_us is None or told.time_us >= work.roofline(gpu)[0] or told.tuned
                    assert told.words
                    assert told.configuration == family.ranked(work, gpu)[0] or told.tuned


def test_hopper_is_served_by_its_own_kernel_and_all_others_by_the_universal_one() -> None:
    work = Work(m=64, n=512, k=512, format="int8")
    for gpu in GPUS.values():
        found = best_family(work, gpu)
        assert found is not None
        assert found[0].name == ("gemm_sm90" if gpu.architecture == "sm_90a" else "gemm_mma")


def test_there_is_a_kernel_for_every_architecture_and_the_formats_of_eight_bits() -> None:
    assert set(architectures()) == set(ARCHITECTURES)
    for gpu in GPUS.values():
        for name in ("int8", "fp8", "bf16"):
            assert best_family(Work(m=1, n=8, k=16, format=name), gpu) is not None


def test_a_tile_is_described_by_each_thing_that_it_does_once() -> None:
    tile = Tile(blocks_of_64=1, tile_n=64, stages=8, swap=True, split=2)
    assert GemmFamily().describe(tile) == "128x64 s8 split2 swap"
    assert GemmFamily().describe(replace(tile, split=1, swap=False, cluster=2)) == "128x64 s8 c2"


def test_a_build_compiles_each_configuration_once() -> None:
    jobs = jobs_of(usual_works(["int8"]), ["sm_90a"])
    assert 4 <= len(jobs) == len(set(jobs)) < 80
    assert {job.arch for job in jobs} == {"sm_90a"}
    assert {job.source.name for job in jobs} >= {"gemm_sm90.cu"}


def test_a_build_for_what_no_kernel_is_written_for_is_refused() -> None:
    with pytest.raises(KernelError, match=r"sm_75: no kernel is written for it; choose of .*sm_90a"):
        jobs_of(usual_works(["int8"]), ["sm_75"])
