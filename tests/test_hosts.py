"""Two hosts: network namespaces with own addresses, no shared loopback, meaningless names."""

import os
import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch as th
from test_dist import MPIEXEC, REPOSITORY, untouched, with_mpiexec

ADDRESSES = ("10.213.0.1", "10.213.0.2")
MEETING_POINT = "meeting-point.invalid"  # the first host, which it takes for loopback itself
NAMES = (f"127.0.1.1 {MEETING_POINT}\n", f"{ADDRESSES[0]} {MEETING_POINT}\n")
EVERYWHERE = "172.31.213.1"  # of a bridge that both hosts have, as container systems make one


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


def make_hosts(names: list[str], cable: str) -> None:
    for name in names:
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        ip(
            "-n", name, "link", "add", "bridge0", "type", "bridge"
        )  # first in the list of interfaces
        ip("-n", name, "address", "add", f"{EVERYWHERE}/24", "dev", "bridge0")
        ip("-n", name, "link", "set", "bridge0", "up")
    ip("link", "add", f"{cable}0", "type", "veth", "peer", "name", f"{cable}1")
    for number, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
        ip("link", "set", f"{cable}{number}", "netns", name)
        ip("-n", name, "address", "add", f"{address}/24", "dev", f"{cable}{number}")
        ip("-n", name, "link", "set", f"{cable}{number}", "up")


def commands_on(name: str, file: Path, known: str) -> list[str]:
    """What runs the command after it on this host, which knows these names, not its own."""
    file.write_text(known)
    script = (
        f'hostname {name}.invalid && mount --bind {shlex.quote(str(file))} /etc/hosts && exec "$@"'
    )
    return [
        "nsenter",
        f"--net=/run/netns/{name}",
        "unshare",
        "--uts",
        "--mount",
        "sh",
        "-c",
        script,
        "sh",
    ]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two commands: what follows them runs on the first or the second host; no default route."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
        pytest.skip("needs root, and ip, nsenter and unshare")
    tag = uuid.uuid4().hex[:6]
    names = [f"host-{tag}-{number}" for number in range(2)]
    try:
        make_hosts(names, f"v{tag}")
        enter = [
            commands_on(name, tmp_path_factory.mktemp(name) / "hosts", known)
            for name, known in zip(names, NAMES, strict=True)
        ]
        subprocess.run([*enter[0], "true"], check=True, capture_output=True, text=True, timeout=20)
        yield enter
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


JOB = """
import os, sys
import torch as th
from mm_diffusion import dist_util
from test_train import trained, weights
th.set_num_threads(1)
with dist_util.friendly_errors():
    world = dist_util.setup_dist()
    place = os.environ["MASTER_ADDR"]
    total = dist_util.all_sum(th.tensor(float(2 + world.rank))).item()
    trainer = trained(f"{sys.argv[1]}/run", 2, world=world)
    result = {"place": place, "total": total, "local_rank": world.local_rank}
    result["weights"] = weights(trainer)
    th.save(result, f"{sys.argv[1]}/{world.rank}.pt")
"""


def job(tmp_path: Path) -> list[str]:
    (tmp_path / "job.py").write_text(JOB)
    return [sys.executable, str(tmp_path / "job.py"), str(tmp_path)]


def environment(**variables: str) -> dict[str, str]:
    path = f"{REPOSITORY}:{Path(__file__).parent}"
    return untouched() | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def finish(*started: subprocess.Popen) -> str:
    try:
        screen = "".join(process.communicate(timeout=100)[0] for process in started)
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), screen
    return screen


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def mpiexec(tmp_path: Path, hosts: list[list[str]]) -> list[str]:
    """mpiexec on the first host, which reaches the second by a program that stands in for ssh."""
    reach = tmp_path / "reach"
    cases = "".join(
        f'{address}) exec {shlex.join(host)} sh -c "$*" ;;\n'
        for address, host in zip(ADDRESSES, hosts, strict=True)
    )
    reach.write_text(
        f'#!/bin/sh\n[ "$1" != -x ] || shift\nhost=$1\nshift\ncase $host in\n{cases}esac\n'
    )
    reach.chmod(0o755)
    here = ["-localhost", ADDRESSES[0], "-launcher", "ssh", "-launcher-exec", str(reach)]
    return [*hosts[0], str(MPIEXEC), *here, "-hosts", ",".join(ADDRESSES), "-ppn", "1", "-n", "2"]


def assert_trained_alike(tmp_path: Path, place: str) -> None:
    results = [th.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for result in results:
        assert result["place"] == place
        assert result["total"] == 5
        assert result["local_rank"] == 0
    assert results[0]["weights"].keys() == results[1]["weights"].keys()
    assert all(
        th.equal(value, results[1]["weights"][name])
        for name, value in results[0]["weights"].items()
    )


def test_two_hosts_train_alike_when_told_where_to_meet(hosts, tmp_path):
    """As torchrun and the operators of clusters start ranks."""
    env = environment(
        WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR=MEETING_POINT, MASTER_PORT="29501"
    )
    finish(
        *(
            start([*host, *job(tmp_path)], env | {"RANK": str(rank)})
            for rank, host in enumerate(hosts)
        )
    )
    assert_trained_alike(tmp_path, MEETING_POINT)


@with_mpiexec
def test_two_hosts_that_mpiexec_starts_find_an_address_by_themselves(hosts, tmp_path):
    finish(start([*mpiexec(tmp_path, hosts), *job(tmp_path)], environment()))
    assert_trained_alike(tmp_path, ADDRESSES[0])
