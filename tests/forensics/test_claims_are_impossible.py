"""The seed's tables as it printed them, and that its cards could not have done it."""

import pytest

from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.forensics import findings
from kvtuner_sglang.forensics.as_the_script import REPLY, NodeReply
from kvtuner_sglang.forensics.claimed import claimed
from kvtuner_sglang.measure.hardware import PEAKS


def reply(status: int = 404, is_json: bool = True) -> NodeReply:
    return NodeReply(REPLY, "http://node1", 10, 1, 1.0, 1.002, status, is_json, "a body")


def test_the_floor_of_its_hardware_by_hand() -> None:
    """7.62e9 parameters, of them 0.545e9 in the embedding and as many in lm_head."""
    seed = claimed()
    card = PEAKS[seed.gpu]
    assert seed.floor.checkpoint.parameters == pytest.approx(7.62e9, rel=0.001)
    read_ms = (7.616e9 - 0.545e9) * 2 / (2 * card.bytes_per_s) * 1e3
    assert seed.floor.decode_step_ms(1, 0) == pytest.approx(read_ms, rel=0.001)
    for tokens in (10, 50, 100, 500):
        assert seed.floor.prefill_ms(0, tokens) == pytest.approx(read_ms, rel=0.001)
    arithmetic_ms = 2 * (7.616e9 - 2 * 0.545e9) * 1000 / (4 * card.flops_per_s) * 1e3
    assert arithmetic_ms < seed.floor.prefill_ms(0, 1000) < 1.05 * arithmetic_ms  # attention comes on top


def test_no_time_in_its_tables_could_have_been_an_answer() -> None:
    seed = claimed()
    assert seed.status == "claimed"
    for row in seed.ttft:
        assert row.min_ms <= row.mean_ms <= row.max_ms < seed.floor.prefill_ms(0, row.prompt_tokens)
    for level in seed.throughput:
        assert level.latency_ms < seed.floor.decode_step_ms(1, 0)


@pytest.mark.parametrize("other", [reply(status=200), reply(status=503), reply(is_json=False)])
def test_another_reply_of_node_1_is_no_finding(other: NodeReply) -> None:
    findings.require_not_found([reply(), reply()])
    with pytest.raises(MeasurementInvalid, match=f"node1_answers_404: 1 of 2 .* HTTP {other.http_status}"):
        findings.require_not_found([reply(), other])
