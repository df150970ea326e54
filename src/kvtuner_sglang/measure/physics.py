"""What no honest server can do: answer before its hardware could, or take the same time whatever was asked.

The floor is that of the machine that the run is on (measure/roofline.py) for the model that was asked for
(measure/hardware.py): the prompt's arithmetic, or reading the weights once, and for every further token the weights
once more.  All of it is a lower bound, the server's own work comes on top, so an honest run cannot break it.

Whether a server's times are made up cannot be told from prompts alone: on a fast GPU ten tokens and a thousand honestly
take the same time, for both wait for the same kernels to start.  What none can escape is that a token needs the one
before it: an answer of more tokens is more steps, one after the other.  So `constant_time` wants answers of twice the
tokens and more to take longer than short ones, by the floor of the steps between them.
"""

from collections.abc import Iterable, Mapping

from kvtuner_sglang.config import RunConfig
from kvtuner_sglang.cpu_engine.environment import cpu_server_environment
from kvtuner_sglang.errors import MeasurementInvalid
from kvtuner_sglang.evidence.record import Metric, metric_key
from kvtuner_sglang.measure.hardware import Decoder, Floor, Peak
from kvtuner_sglang.measure.memory import ITEMSIZE
from kvtuner_sglang.measure.metrics import summarize
from kvtuner_sglang.measure.roofline import Roofline, Say, roofline
from kvtuner_sglang.measure.ttft import MS_PER_S, ttft_ms
from kvtuner_sglang.serving.client import Sample
from kvtuner_sglang.serving.device import serving_device

# How far above the measured roofline an engine is believed: its kernels may beat torch's, clocks may rise for a moment.
MARGIN = 2.0
MORE_STEPS = 2  # times as many output tokens are certainly more work


def floor_of_run(config: RunConfig, checkpoint: Decoder, machine: str, say: Say) -> Floor:
    """The floor of `checkpoint` served as `config` says on this machine; raises RunFailed if it cannot be measured."""
    device = serving_device(config.server)
    dtype = config.model.dtype_cpu if device == "cpu" else config.model.dtype_cuda
    unread = checkpoint.vocab_size * checkpoint.hidden_size  # the embedding: one row of it a token
    weight_bytes = (checkpoint.parameters - unread) * ITEMSIZE[dtype]
    measured = roofline(device, dtype, weight_bytes // config.dist.ranks, machine, say)
    return Floor(peak_of_run(measured, config), checkpoint, ITEMSIZE[dtype], kv_bytes_per_token=0.0)


def peak_of_run(measured: Roofline, config: RunConfig) -> Peak:
    """What all ranks could do together.

    Arithmetic: every rank, since pipeline stages work on different chunks of one prompt at a time.  Reading: the ranks
    of one stage, since a token passes the stages one after the other.
    """
    tp, ranks = config.dist.tp, config.dist.ranks
    if measured.device == "cpu":
        threads = int(cpu_server_environment(tp, ranks, node_rank=0)["OMP_NUM_THREADS"])
        tp, ranks = tp * threads, ranks * threads
    return Peak(MARGIN * tp * measured.bytes_per_s, MARGIN * ranks * measured.flops_per_s,
                f"measured, one {measured.device} worker of {ranks}, times {MARGIN:g}")


def floor_metrics(floor: Floor, prompt_tokens: Iterable[int]) -> dict[str, Metric]:
    """ttft_floor_ms at every prompt length and tpot_floor_ms, for the record; nothing of unknown hardware."""
    step_ms = floor.decode_step_ms(batch=1, context=0)
    if step_ms is None:
        return {}
    metrics = {"tpot_floor_ms": summarize([step_ms], "ms")}
    for tokens in prompt_tokens:
        prefill_ms = floor.prefill_ms(cached=0, new=tokens)
        if prefill_ms is not None:
            metrics[metric_key("ttft_floor_ms", prompt_tokens=tokens)] = summarize([prefill_ms], "ms")
    return metrics


def require_above_floor(samples: Iterable[Sample], floor: Floor) -> None:
    """Raise MeasurementInvalid if a valid sample has its first or its last token before the hardware could have it.

    The whole answer is timed from its sending: tokens that reach a busy client in one go are late, never early.  What
    came from the prefix cache, which another rule looks at, need not be computed again.
    """
    for sample in samples:
        cached = sample.cached_tokens or 0
        first_ms = floor.prefill_ms(cached, sample.prompt_tokens_sent - cached)
        step_ms = floor.decode_step_ms(1, 0)
        if first_ms is None or step_ms is None:
            return
        whole_ms = first_ms + (sample.stream_tokens - 1) * step_ms
        for name, took_ms, least_ms in (("first token", ttft_ms(sample), first_ms),
                                        (f"{sample.stream_tokens} tokens", answer_ms(sample), whole_ms)):
            if took_ms < least_ms:
                raise MeasurementInvalid(
                    f"faster_than_floor: {sample.kind} request {sample.request_id} ({sample.prompt_tokens_sent} prompt "
                    f"tokens) had its {name} after {took_ms:.3f} ms, which takes this machine {least_ms:.3f} ms at "
                    "least, so no model answered it.")


def require_tpot_above_floor(metrics: Mapping[str, Metric], floor: Floor) -> None:
    """Raise MeasurementInvalid if a median time per output token is shorter than reading the weights once."""
    step_ms = floor.decode_step_ms(1, 0)
    for key, metric in metrics.items():
        if key.startswith("tpot_ms/") and step_ms is not None and metric.p50 < step_ms:
            raise MeasurementInvalid(f"faster_than_floor: {key} has a median of {metric.p50:.3f} ms, which takes this "
                                     f"machine {step_ms:.3f} ms at least: tokens were held back, or the client was.")


def require_work_takes_time(alone: Iterable[Sample], loaded: Iterable[Sample], floor: Floor) -> None:
    """Raise MeasurementInvalid unless longer answers took the time of their further tokens longer than short ones.

    alone: sent one at a time.  loaded: sent later, any number at once, all of one length.  The fastest of each are
    compared: other work on the machine only ever adds time, so the fastest of the long ones is above its floor
    whatever happens, and the fastest of several short ones is late only by what disturbed them all.  Below the floor
    nothing can be told, so neither can answers whose jitter exceeds the floor of all their further tokens.  Nothing
    is said where the loaded answers have less than MORE_STEPS times the tokens, nor of prompts that were longer alone.
    """
    long = list(loaded)
    step_ms = floor.decode_step_ms(1, 0)
    prompt, most = (long[0].prompt_tokens_sent, long[0].output_tokens_asked) if long else (0, 0)
    short = [sample for sample in alone
             if sample.prompt_tokens_sent <= prompt and MORE_STEPS * sample.output_tokens_asked <= most]
    if step_ms is None or not short:
        return
    fewest = short[0].output_tokens_asked
    short_ms, long_ms = (min(answer_ms(sample) for sample in samples) for samples in (short, long))
    least_ms = (most - fewest) * step_ms
    if long_ms - short_ms < least_ms:
        raise MeasurementInvalid(
            f"constant_time: at their fastest {most} tokens took {long_ms:.1f} ms and {fewest} tokens {short_ms:.1f} "
            f"ms; {most - fewest} more take this machine {least_ms:.1f} ms at least, one after the other, so no model "
            "wrote them.")


def answer_ms(sample: Sample) -> float:
    """Milliseconds from sending the request to its last token; of a valid sample only."""
    return (sample.token_times_s[-1] - sample.sent_s) * MS_PER_S
