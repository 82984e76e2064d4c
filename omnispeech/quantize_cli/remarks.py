"""What a user should know of the choices before the work begins."""

from collections.abc import Iterator

from omnispeech.quantize_cli.choices import Choices


def remarks(chosen: Choices) -> list[str]:
    return [*(_of_max_quality(chosen) if chosen.max_quality else ()), *_of_method(chosen)]


def _of_max_quality(chosen: Choices) -> Iterator[str]:
    """As it came out: other flags go before it."""
    method, calibrate = chosen.method, chosen.calibrate
    layers = chosen.run.keep_fp_layers
    kept = ", ".join(map(str, layers))
    floats = f"layers {kept} stay float" if len(layers) > 1 else f"layer {kept} stays float"
    grid = f", {method.search_step} times the grid" if method.method == "awq" else ""
    samples = "any number of" if calibrate.max_samples is None else str(calibrate.max_samples)
    yield (
        f"--max_quality: {floats if layers else 'no layer stays float'}, "
        f"refined up to {method.passes} times{grid}, {samples} samples of up to "
        f"{calibrate.seq_len} tokens, {calibrate.max_tokens} tokens in all (--max-tokens)"
    )
    if chosen.device != "cpu":
        yield (
            "--max_quality uses the GPU where there is one: layers pass one by one, so that none "
            "runs out of memory; --force_cpu is there for those who want it"
        )
    if method.salient_quota:
        return
    if method.rounds == "rtn":
        yield (
            "--max_quality lists salient columns and stores no residuals; --salient-quota 0.004 "
            "stores them"
        )
        return
    other = "--awq --rounding rtn" if method.method == "gptq" else "--rounding rtn"
    yield (
        "--max_quality lists salient columns and stores no residuals: GPTQ rounding has made them "
        f"good already ({other} --salient-quota 0.004 stores them)"
    )


def _of_method(chosen: Choices) -> Iterator[str]:
    method = chosen.method
    if method.method == "awq" and method.bits == 8:
        yield (
            "8-bit AWQ is written as symmetric GPTQ v1 with the channel scales of AWQ folded in: "
            "no server reads 8-bit AWQ files"
        )
    elif method.method == "awq" and method.symmetric:
        yield "--no-zero-point: codes are symmetric, stored with zero points of 8"
    if method.salient_quota:
        yield "residuals of salient columns are read by omnispeech alone"
    if method.method == "gptq" and method.act_order and not method.fixed_groups:
        yield (
            "act-order with g_idx: servers run it slower, and copy its scales to every GPU; "
            "--static-groups has most of the gain without"
        )
