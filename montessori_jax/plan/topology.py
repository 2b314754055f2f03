"""The devices of a TPU topology that is not there, as the TPU compiler describes them."""

import os
from importlib.util import find_spec

import jax

from montessori_jax.errors import UserError
from montessori_jax.plan.targets import Target, parse_target

ONE_CHIP = (1, 1, 1)
# A host's chips, as a slice of their own.
HOSTS = {4: "2x2", 8: "2x4"}
# The library would ask a metadata server what this host is, complain that it does not say, and hold
# a lock as if it held chips.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(target: Target) -> list[jax.Device]:
    """Devices to compile for; nothing can run on them.

    Needs `libtpu` and no TPU. What the host's own devices are does not matter.

    Raises:
        UserError: libtpu is not installed, or does not know the topology.
    """
    if find_spec("libtpu") is None:
        raise UserError(
            f"target {target.name} is compiled by the TPU compiler, which is not installed: "
            "pip install 'montessori-jax[tpu-plan]'"
        )
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, object] = {}
    if target.slices > 1:
        options["num_slices"] = target.slices
    if target.chips == target.slices:
        options["chips_per_host_bounds"] = ONE_CHIP
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=target.topology or "", **options
        )
    except Exception as error:  # the plugin raises what the compiler's library does
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"target {target.name}: the TPU compiler does not know it: {reason}"
        ) from None
    return list(found.devices)


def host_devices(target: Target, devices: list[jax.Device]) -> tuple[list[jax.Device], int]:
    """One host's devices, as those of a slice of its own, and how many hosts there are.

    The compiler takes no program for some of a slice's chips.

    Args:
        target: the slices.
        devices: `topology_devices` of it.
    """
    hosts = {device.process_index for device in devices}
    if len(hosts) == 1:
        return devices, 1
    kind = (target.topology or "").partition(":")[0]
    shape = HOSTS[len(devices) // len(hosts)] + ("x1" if kind == "v5p" else "")
    return topology_devices(parse_target(f"{kind}:{shape}")), len(hosts)
