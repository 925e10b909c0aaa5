"""Shielded PPO: reinforcement learning of the explainer's adapters, the shield in the optimizer.

One iteration is ``PPO.step``; notebook 05 calls its pieces one by one. Shapes: B texts, R tokens
a text; masks are True on real tokens, the end token included. Choices where public trainers differ
(Huang et al. 2024, arXiv 2403.17031): the score is on the last real token; the k1 KL penalty is in
the reward, none in the loss; no top-p, top-k or dropout; the value head reads detached states, so
that the shield sees the policy's gradient alone; losses are sums over the minibatch's token count.
Each of several processes samples its share of the prompts with the random numbers that one process
would have drawn.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.explainer.sampling import Rollout, Settings, response_hidden, sample, token_logprobs
from recrl_lib.params import Params
from recrl_lib.progress import track
from recrl_lib.shield.projection import Shield
from recrl_lib.training.checkpoint import Store
from recrl_lib.training.diagnostics import autocasts, precision, processes

Log = Callable[[dict, int], None]  # called with (row, step)


def total(x: Tensor, largest: bool = False) -> Tensor:
    """Sum (or maximum) of ``x`` over the processes, in place; with one process, ``x``."""
    if processes()[1] > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return x


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked entries of all processes."""
    return total((x * mask).sum()) / total(mask.sum())


def variance(x: Tensor, mask: Tensor) -> Tensor:
    return mean((x - mean(x, mask)).square(), mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the masked entries of all processes; 0 elsewhere."""
    return (x - mean(x, mask)) * torch.rsqrt(variance(x, mask) + 1e-8) * mask


class ValueHead(nn.Linear):
    """V(state) from a detached hidden state (..., d), in float32; 0 everywhere at first."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.detach().float())


def draw_prompts(queue: list, n: int, prompts: int, generator: Generator) -> tuple[list, list]:
    """(the next ``n`` prompts, the queue after them): random orders of all, one after another."""
    if prompts < n:
        raise ValueError(f"prompts_per_step={n}, but there are only {prompts} prompts")
    if len(queue) < n:
        queue = torch.randperm(prompts, generator=generator).tolist()
    return queue[:n], queue[n:]


def roll_out(
    explainer: Explainer, records: list[dict], params: Params, generator: Generator, head: ValueHead
) -> Rollout:
    """``samples_per_prompt`` texts a record, adjacent, with log-probabilities and values."""
    prompts = [prompt_ids(explainer, messages(record)) for record in records]
    settings = Settings(params.max_new_tokens, params.temperature, params.samples_per_prompt)
    gpu = explainer.device.type == "cuda"  # a CPU samples in float32
    with precision(params, explainer.device) if gpu else nullcontext():
        rollout = sample(explainer, prompts, settings, generator, head)
    if autocasts(params, explainer.device):
        rollout.logprobs = logprobs(explainer, rollout, params)
    return rollout


@torch.no_grad()
def logprobs(explainer: Explainer, rollout: Rollout, params: Params) -> Tensor:
    """Log-probabilities (B, R) of the sampled tokens under the adapters as they are now."""
    found, start = torch.zeros_like(rollout.logprobs), 0
    for part in micro_batches(rollout, params.micro_batch):
        with precision(params, explainer.device):
            logp = token_logprobs(explainer, part, params.temperature)
        found[start : start + len(logp), : logp.shape[1]] = logp
        start += len(logp)
    return found


@dataclass
class Batch(Rollout):
    advantages: Tensor  # (B, R), whitened
    returns: Tensor  # (B, R)


def part_of(texts: Rollout, prompts: Tensor) -> Any:
    """The given prompts (numbers, perhaps none) with all their texts, no wider than these are."""
    prompts = prompts.to(texts.mask.device)
    rows = torch.arange(len(texts.mask), device=prompts.device)
    rows = rows.view(-1, texts.samples)[prompts].flatten()
    start = min(texts.prompt_mask[prompts].int().argmax(-1).tolist(), default=0)
    length = max(texts.mask[rows].sum(-1).tolist(), default=1)
    where: dict = dict.fromkeys(("prompt_mask", "prompt_states"), (prompts, slice(start, None)))
    where |= {"states": (rows, slice(length - 1)), "ended": rows}  # the rest is (B, R)
    part = {
        k: v[where.get(k, (rows, slice(length)))] for k, v in vars(texts).items() if k != "texts"
    }
    return type(texts)(**part, texts=[])


def micro_batches(texts: Rollout, size: int) -> Iterator[Any]:
    """Parts of at most ``size`` texts, or of one prompt with all its texts."""
    prompts = torch.arange(len(texts.prompt_mask))
    for chosen in prompts.split(max(size // texts.samples, 1)) if len(prompts) else ():
        yield part_of(texts, chosen)


def token_rewards(
    score: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """Rewards (B, R): a k1 KL penalty on every token, plus ``score`` (B,) on the last real one."""
    rewards = -kl_coef * (logprobs - reference) * mask
    rewards[torch.arange(len(score)), mask.sum(-1) - 1] += score
    return rewards


def leave_one_out(rewards: Tensor, samples: int) -> Tensor:
    """A baseline (B, 1) a text: the mean return of the other texts of its prompt.

    ``rewards`` (B, R), 0 after the end. As in RLOO (Ahmadian et al. 2024, arXiv 2402.14740).
    """
    returns = rewards.sum(-1).view(-1, samples)
    others = returns.sum(1, keepdim=True) - returns
    return (others / (samples - 1)).view(-1, 1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> Tensor:
    """Generalised advantages (B, R), gamma 1, value 0 after the end (Schulman et al. 2016)."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        advantages[:, t] = torch.where(mask[:, t], delta + lam * next_advantage, 0.0)
        next_advantage, next_value = advantages[:, t], values[:, t].where(mask[:, t], 0.0)
    return advantages


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Non-negative estimate of KL(policy || reference) per token of the policy's own samples."""
    x = (logprobs - reference).clamp(-20, 20)
    return torch.expm1(-x) + x


def policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(clipped surrogate, summed; clipped tokens; ratios (N,)) (Schulman et al. 2017, eq. 7)."""
    ratio = (new - old).clamp(-20, 20).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, clipped).sum(), (clipped < plain).sum(), ratio.detach()


def value_loss(new: Tensor, old: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Sum over tokens of half the larger of the plain and the clipped squared error."""
    near = old + (new - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((new - returns).square(), (near - returns).square()).sum()


STATISTICS = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "entropy")


def losses(
    explainer: Explainer, head: ValueHead, batch: Batch, params: Params
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, ``STATISTICS`` (5,), largest |ratio - 1|) of a micro-batch, the first two summed."""
    real = batch.mask  # all below is (N,): one entry a real token
    with precision(params, explainer.device):
        hidden = response_hidden(explainer, batch)[real]
        logp = explainer.log_softmax(hidden, params.temperature)
    new, old = logp.gather(-1, batch.response[real][:, None])[:, 0], batch.logprobs[real]
    policy, clipped, ratio = policy_loss(new, old, batch.advantages[real], params.clip_range)
    value = policy.new_zeros(())
    if params.baseline == "value":
        values, before = head(hidden)[:, 0], batch.values[real]
        value = value_loss(values, before, batch.returns[real], params.value_clip)
    with torch.no_grad():
        approx_kl, entropy = (ratio - 1 - (new - old)).sum(), -(logp.exp() * logp).sum()
        statistics = torch.stack([policy, value, clipped, approx_kl, entropy])
    return policy + value, statistics, (ratio - 1).abs().max()


def learner(explainer: Explainer, params: Params) -> tuple[ValueHead, AdamW]:
    """A new value head, and AdamW on the adapters (group 0) and on it (group 1)."""
    head = ValueHead(explainer.lm.config.hidden_size, 1, device=explainer.device)
    adapters = {"params": explainer.adapter_parameters(), "lr": params.learning_rate}
    values = {"params": list(head.parameters()), "lr": params.value_lr}
    return head, AdamW([adapters, values], eps=1e-5, weight_decay=0.0)


def optimizer_step(
    optimizer: Optimizer, explainer: Explainer, head: ValueHead, batch: Batch, params: Params
) -> dict[str, float]:
    """One step on a minibatch; means over its tokens. ``RuntimeError``: gradient not finite."""
    tokens = total(batch.mask.sum())
    sums = torch.zeros(len(STATISTICS), device=tokens.device)
    deviation = torch.zeros((), device=tokens.device)
    optimizer.zero_grad(set_to_none=True)
    for part in micro_batches(batch, params.micro_batch):  # of this process: perhaps none
        loss, statistics, off = losses(explainer, head, part, params)
        (loss / tokens).backward()
        sums, deviation = sums + statistics, torch.maximum(deviation, off)
    adapters = explainer.adapter_parameters()
    for p in (*adapters, *head.parameters()):
        p.grad = total(torch.zeros_like(p) if p.grad is None else p.grad)
    norm = nn.utils.clip_grad_norm_(adapters, params.max_grad_norm)
    if not torch.isfinite(norm):
        raise RuntimeError("the gradient is not finite; lower learning_rate or kl_coef")
    nn.utils.clip_grad_norm_(head.parameters(), params.max_grad_norm)
    optimizer.step()
    means = dict(zip(STATISTICS, (total(sums) / tokens).tolist(), strict=True))
    largest = float(total(deviation, largest=True))
    return {**means, "gradient_norm": float(norm), "ratio_deviation": largest}


class PPO:
    """The training of one policy; the shield stays on its optimizer.

    ``reward(records, texts)`` returns totals (n,) and a dict of parts, each (n,). Equal seeds meet
    the same prompts and the same random numbers.
    """

    def __init__(
        self,
        explainer: Explainer,
        reward: Callable,
        records: list[dict],
        params: Params,
        seed: int,
        shield: Shield | None = None,
    ):
        if not explainer.adapter_parameters():
            raise ValueError("the explainer has nothing to train; call add_lora first")
        self.explainer, self.reward, self.records, self.params = explainer, reward, records, params
        self.value_head, self.optimizer = learner(explainer, params)
        self.shield = shield.attach(self.optimizer) if shield else None
        self._replay = shield.replay if shield else None
        streams = enumerate(("order", "sampling", "minibatch"))
        self._generators = {name: Generator().manual_seed(seed * 3 + i) for i, name in streams}
        if self._replay:
            self._generators["replay"] = self._replay.generator
        self.queue: list[int] = []  # the prompts to come
        self.rows: list[dict] = []
        self.kl_coef, self.steps_done = params.kl_coef, 0
        self._rank, self._processes = processes()

    def train(
        self, steps: int, desc: str = "ppo", store: Store | None = None, log: Log | None = None
    ) -> list[dict]:
        """Go on from the newest checkpoint of ``store`` to iteration ``steps``; a row each."""
        if store and (found := store.latest()):
            self.load_state(found)
        for done in track(range(self.steps_done + 1, steps + 1), desc):
            row = self.step()
            if log:
                log(row, done)
            due = done % self.params.checkpoint_every == 0 or done == steps
            if store and due and self._rank == 0:
                store.save_step(done, self.state())
        return self.rows

    def step(self) -> dict:
        """One iteration; its row of statistics, which notebook 05 explains."""
        start, before = perf_counter(), self.shield.seconds if self.shield else 0.0
        rollout, records = self._roll_out()
        sampled, mask, texts = perf_counter(), rollout.mask, len(records) * self._processes
        scores = self._scores(records, rollout)
        with self.explainer.reference():
            reference = logprobs(self.explainer, rollout, self.params)
        rewards = token_rewards(scores["score"], rollout.logprobs, reference, mask, self.kl_coef)
        if self.params.baseline == "leave_one_out":
            rollout.values = leave_one_out(rewards, self.params.samples_per_prompt) * mask
        advantages = gae(rewards, rollout.values, mask, self.params.gae_lambda)
        white, returns = whiten(advantages, mask), advantages + rollout.values
        update = self._update(Batch(**vars(rollout), advantages=white, returns=returns))
        self.steps_done += 1
        scores["kl"] = (k3(rollout.logprobs, reference) * mask).sum(-1)
        residual = mean(advantages.square(), mask)
        best = scores["reward"].view(-1, self.params.samples_per_prompt).amax(1)  # of each prompt
        every, tokens = torch.ones_like(rollout.ended), int(total(mask.sum()))
        row = {
            "step": self.steps_done,
            "episodes": self.steps_done * texts,
            **{name: float(mean(values, every)) for name, values in scores.items()},
            "best_reward": float(mean(best, torch.ones_like(best))),
            "kl_coef": self.kl_coef,
            "surprisal": float(-mean(rollout.logprobs, mask)),
            "length": tokens / texts,
            "advantage_std": float(variance(advantages, mask).sqrt()),
            "explained_variance": float(1 - residual / variance(returns, mask).clamp(1e-8)),
            **update,
            "generated_tokens_per_second": tokens / (sampled - start),
            "shield_seconds": (self.shield.seconds if self.shield else 0.0) - before,
            "step_seconds": perf_counter() - start,
        }
        self.rows.append(row)
        if self.params.kl_target:  # at most 2 % nearer (Ziegler et al. 2019, sec. 2.2)
            off = min(max(row["kl"] / self.params.kl_target - 1, -0.2), 0.2)
            self.kl_coef *= 1 + 0.1 * off
        return row

    def _roll_out(self) -> tuple[Rollout, list[dict]]:
        """This process's share of the rollout, and the record of each of its texts."""
        n, samples = self.params.prompts_per_step, self.params.samples_per_prompt
        order, sampling = self._generators["order"], self._generators["sampling"]
        chosen, self.queue = draw_prompts(self.queue, n, len(self.records), order)
        share, numbers = n // self._processes, samples * self.params.max_new_tokens
        before, after = self._rank * share, (self._processes - 1 - self._rank) * share
        records = [self.records[i] for i in chosen[before : before + share]]
        # Random numbers of the texts of the processes before and after this one are left out.
        torch.rand(before * numbers, generator=sampling, dtype=torch.float64)
        rollout = roll_out(self.explainer, records, self.params, sampling, self.value_head)
        torch.rand(after * numbers, generator=sampling, dtype=torch.float64)
        return rollout, [record for record in records for _ in range(samples)]

    def _scores(self, records: list[dict], rollout: Rollout) -> dict[str, Tensor]:
        """Reward, its parts, score and "ended" of each text (B,); the first ones set the values."""
        reward, parts = self.reward(records, rollout.texts)
        found = {"reward": reward, **{f"reward_{name}": part for name, part in parts.items()}}
        place = {"dtype": torch.float32, "device": rollout.mask.device}
        scores = {name: torch.as_tensor(values, **place) for name, values in found.items()}
        scores["eos_rate"] = rollout.ended.float()
        scores["score"] = scores["reward"] - self.params.missing_eos_penalty * ~rollout.ended
        if self.steps_done == 0:  # values that had to climb there would add noise
            first = float(mean(scores["score"], torch.ones_like(rollout.ended)))
            nn.init.constant_(self.value_head.bias, first)
            rollout.values = self.value_head.bias.detach() * rollout.mask
        return scores

    def _update(self, batch: Batch) -> dict[str, float]:
        """``ppo_epochs`` passes over the rollout; means of the steps' statistics."""
        params, steps, mine = self.params, [], len(batch.prompt_mask)
        prompts, each = mine * self._processes, params.ppo_epochs * params.minibatches
        rates, linear = (params.learning_rate, params.value_lr), params.lr_schedule == "linear"
        for _ in range(params.ppo_epochs):
            order = torch.randperm(prompts, generator=self._generators["minibatch"])
            for chosen in order.split(prompts // params.minibatches):
                done = self.steps_done * each + len(steps)  # as if no pass were ever skipped
                factor = 1 - done / (params.ppo_steps * each) if linear else 1.0
                for group, rate in zip(self.optimizer.param_groups, rates):
                    group["lr"] = rate * max(factor, 0.0)
                part = part_of(batch, chosen[chosen // mine == self._rank] % mine)
                pieces = self.optimizer, self.explainer, self.value_head, part, params
                steps.append(optimizer_step(*pieces))
                steps[-1]["replay_norm"] = self._replay.norm if self._replay else 0.0
            recent = [step["approx_kl"] for step in steps[-params.minibatches :]]
            if params.stop_kl and sum(recent) / len(recent) > params.stop_kl:
                break
        first = steps[0]["ratio_deviation"]  # 0 before any step, if sampler and update agree
        means = {key: sum(step[key] for step in steps) / len(steps) for key in steps[0]}
        del means["ratio_deviation"]
        means["epochs_skipped"] = params.ppo_epochs - len(steps) // params.minibatches
        rate = self.optimizer.param_groups[0]["lr"]
        return {**means, "learning_rate": rate, "ratio_first_minibatch_max_dev": first}

    def state(self) -> dict:
        """All that decides the next step, for a checkpoint."""
        plain = ("steps_done", "kl_coef", "rows", "queue")
        return {
            "adapter": self.explainer.adapter_state(),
            "value": self.value_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": {name: each.get_state() for name, each in self._generators.items()},
            "plain": {name: getattr(self, name) for name in plain},
        }

    def load_state(self, state: dict) -> None:
        self.explainer.load_adapter(state["adapter"])
        self.value_head.load_state_dict(state["value"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, generator in self._generators.items():
            generator.set_state(state["generators"][name])
        vars(self).update(state["plain"])
