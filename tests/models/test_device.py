"""A device is one that computes and gives back what it computed."""

import pytest

from concept_trak.errors import UserError
from concept_trak.models.device import pick_device

ABSENT = (
    "meta hpu xla vulkan ipu mkldnn lazy mtia cuda:99 cuda:-1 cuda:0:1 cpu:-1 CPU gpu 0".split()
)


@pytest.mark.parametrize("name", [*ABSENT, " ", "cuda:\n0", "cpu,cuda"])
def test_a_device_that_this_machine_lacks_is_refused(name, recwarn):
    with pytest.raises(UserError, match="is not available"):
        pick_device(name, "")
    assert not recwarn.list


def test_the_number_of_a_gpu_that_is_not_there_is_refused():
    for number in ("99", "-1", "0 1", "cpu"):
        with pytest.raises(UserError, match=f"device 'cuda:{number}' is not available"):
            pick_device("", number)


def test_the_cpu_has_one_name():
    assert pick_device("cpu", "") == pick_device("cpu:0", "3") == "cpu"
