"""``make bench``: the parts that cost the most, each beside the plain way to do it, in one run.

Times are CPU-seconds of this process (wall seconds on a GPU), so that other work on the machine weighs
less; read the ratios, which carry over, rather than the seconds, which do not.
"""

import os
import time
from collections.abc import Callable

import numpy as np
import torch

from recrl_lib import assets, bench_data, bench_ranker, config, datasets, explainer as ex, ppo, rewards, shield as sh, study

PROMPTS, SAMPLES, TOKENS, ITEMS = 8, 4, 40, 320


def clocked(function: Callable, device: torch.device) -> tuple[float, object]:
    """(seconds, result) of one call."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def show(what: str, ours: float, plain: float, plain_is: str) -> None:
    print(f"{what:<28}{ours:>8.2f} s{plain:>9.2f} s{plain / ours:>7.1f} x   {plain_is}", flush=True)


def bench_records(data: datasets.Dataset) -> list[dict]:
    """Real prompts: the first users' histories and the most popular film."""
    histories = [g["item"].to_numpy() for _, g in data.interactions.groupby("user", sort=True)]
    popular = data.interactions["item"].value_counts().index[:10].to_numpy()
    return ex.build_records(data.items, histories, np.tile(popular, (len(histories), 1)), range(PROMPTS), [1] * PROMPTS, 5)


def main() -> None:
    os.environ["RECRL_PROGRESS"] = "off"  # bars would cut the table
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    params = config.resolve("laptop", prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES, max_new_tokens=TOKENS)
    reader = ex.load_for(params, 0, device)
    data = datasets.load("ml-100k", assets.ml100k_folder())
    records = bench_records(data)
    prompts = [ex.prompt_ids(reader, ex.messages(r)) for r in records]
    print(f"{device}, {torch.get_num_threads()} threads, {params.llm}, adapters on the top {params.lora_layers} of {reader.n_layers} layers")
    print(f"{'':<28}{'ours':>10}{'plain':>11}{'ratio':>9}   the plain way")

    generator = torch.Generator().manual_seed(0)
    ours, rollout = clocked(lambda: ex.sample(reader, prompts, SAMPLES, TOKENS, params.temperature, generator), device)
    ids, mask = ex.left_pad([p for p in prompts for _ in range(SAMPLES)], reader.pad_id, device)
    generate = dict(max_new_tokens=TOKENS, do_sample=True, temperature=params.temperature, top_k=0, top_p=1.0, pad_token_id=reader.pad_id)
    plain, out = clocked(lambda: reader.lm.generate(input_ids=ids, attention_mask=mask.long(), **generate), device)
    generated = out[:, ids.shape[1]:]
    plain_tokens = int((generated != reader.pad_id).sum())
    tokens = int(rollout.mask.sum())
    show("sample, a 1,000 tokens", 1000 * ours / tokens, 1000 * plain / plain_tokens, "transformers' generate")

    full = torch.cat([ids, rollout.response], 1)[:, :-1]
    full_mask = rollout.full_mask

    def whole() -> None:
        logits = reader.lm(input_ids=full, attention_mask=full_mask.long(), position_ids=ex.position_ids(full_mask)).logits
        torch.log_softmax(logits[:, ids.shape[1] - 1:].float(), -1).gather(-1, rollout.response[..., None]).sum().backward()

    ours, _ = clocked(lambda: ex.token_logprobs(reader, rollout, params.temperature).sum().backward(), device)
    plain, _ = clocked(whole, device)
    show("update, one pass", ours, plain, "all layers, all positions through the head")

    items = ex.ItemTexts(reader, data.items["text"].tolist()[:ITEMS])
    items.states()
    ours, _ = clocked(items.vectors, device)

    @torch.no_grad()
    def encode() -> None:
        for _, part in items.batches:
            reader.lm.model(input_ids=part.to(device)).last_hidden_state.mean(1)

    plain, _ = clocked(encode, device)
    show(f"re-encode {ITEMS} items", ours, plain, "all layers")

    grams, _ = sh.item_grams(reader, items)
    shield = sh.Shield(reader, sh.subspaces(grams, params.shield_energy))
    reward = rewards.Reward("grounded", study.catalogue_of(data.items))
    seconds, line = clocked(ppo.PPO(reader, reward, records, params, 0, shield).step, device)
    print(f"\none Shielded PPO step: {seconds:.1f} s, of which the shield {100 * line['shield_seconds'] / line['step_seconds']:.2f} %")
    texts = rollout.texts * 40
    seconds, _ = clocked(lambda: reward([r for r in records for _ in range(SAMPLES)] * 40, texts), torch.device("cpu"))
    print(f"reward: {len(texts) / seconds:,.0f} texts a CPU-second")
    bench_ranker.main()
    bench_data.main()


if __name__ == "__main__":
    main()
