from tests.pallas_kernels.dilated_attention.cases import SMALL
from tests.pallas_kernels.dilated_attention.suite import Suite


class TestXla(Suite):
    name = "xla"
    must_take = tuple(SMALL)
