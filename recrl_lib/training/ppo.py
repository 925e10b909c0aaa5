r"""Shielded PPO: tune the explainer's adapters on a text reward, with the shield in the optimizer.

One iteration, in the order of ``step()``:

1. *Roll out*: sample responses to prompts, keeping log-probs, values and trunk states as they come.
2. *Reward*: the text's score on its last token; on every token ``-kl_coef * (logp - logp_ref)``
   (k1, computed once, no gradient), where the reference is this model with its adapters off.
3. *Advantages*: GAE (gamma 1), whitened over the whole rollout.
4. *Update*: ``ppo_epochs`` x ``minibatches`` real optimizer steps on the clipped surrogate and the
   clipped value loss; gradient clipping, then the shield (its hooks sit on the optimizer).

What each statistic of a step means is said once, in ``recrl_lib.vitals``.

Conventions, after Huang et al. 2024 (arXiv 2403.17031) where not argued otherwise:

* One boolean mask marks response tokens (EOS included); every mean is over it. Losses are sums over a
  minibatch's tokens divided by its token count, so a long answer does not weigh less per token, and
  neither micro-batches nor processes change the update.
* A response cut off before its EOS pays ``missing_eos_penalty``; its end counts as terminal (no
  bootstrap), as in the reference implementations.
* The value head reads the hidden state before each token and is detached from the trunk: the shield
  then sees the policy gradient and nothing else. It starts at the first rollout's mean score, with a small
  rate: one Adam step moves V by up to ``value_lr`` times the sum of a state's absolute entries (640 for
  SmolLM2-135M). In the laptop run published at d90c9b9 it started at 0 with 1e-4; while it climbed to the
  scores' level, the spread of the unshielded arm's advantages tripled (.10 to .33), most of it noise.
* The logged KL is k3, ``exp(-x) - 1 + x`` with ``x = logp - logp_ref``, which is never negative (Schulman,
  "Approximating KL Divergence"); the reward uses k1, which is unbiased.
* The reward is in [0, 1] by construction, so it is not normalised again.
* lambda is 1 by default: with a value head that knows little, a smaller one would credit late tokens for
  nothing but being late.
* In float32 the sampler's log-probs are those of the training code (``ratio_first_minibatch_max_dev``
  watches it). In bfloat16 they are not, and are computed anew by the training code.

Data parallel: every process holds the model, samples its share of the prompts with the uniforms that one
process would have drawn for them, and takes its rows of each minibatch; token counts, gradients and means
are summed over the processes (plain ``torch.distributed``). So n processes do the update of one.

The checklist of PPO for language models (the items that Huang et al. and the public trainers disagree about or
got wrong), in four groups; "no" is a choice:

======  ==============================================================================================
 1-8    PAD != EOS asserted; masks from lengths; EOS looked for in the response alone; left-padded prompts, one
        position helper; a missing EOS costs, in one place; texts decoded without specials; the score on the last
        real token (EOS or the cut); what SFT put after EOS is never scored, since sampling stops at EOS.
 9-15   One temperature; no top-p, top-k or other processor; old log-probs from the sampler in float32, anew in
        bfloat16; dropout asserted 0; float32 log-softmax; first ratio 1 (tested, and it watches whatever the
        sampler fuses); frozen weights hashed before and after.
16-20   k1 in the reward, no KL in the loss; log-ratios clamped to +-20; no scaling, no whitening of rewards.
21-27   Advantages whitened over the rollout, raw spread logged; GAE against a double loop; cut off = ended, no
        bootstrap; float32 head read before the token, detached; value clip; no value-only warm-up: starting at
        the mean score does its work for nothing. In a short run it hardly moves from there: a batch-mean baseline.
28-35   Clip .2, steps counted in a test; no dual clip (clamped ratios, few epochs); a minibatch's token count before
        micro-batches; token mean; norm clip, then shield (a replay's gradient joins there, unclipped; its norm is logged); AdamW, eps 1e-5, no decay; constant or linear rate by
        planned optimizer step; fixed or adaptive KL (Ziegler et al. 2019).
36-40   Approximate-KL stop between epochs, logged; entropy logged, no bonus; ``vitals``; a generator each for
        prompts, sampling and minibatches; checkpoints of all that decides the next step (``state``).
======  ==============================================================================================
"""

from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.explainer.sampling import Rollout, response_hidden, sample, token_logprobs
from recrl_lib.progress import track
from recrl_lib.shield.projection import Shield
from recrl_lib.training.checkpoint import Store
from recrl_lib.training.diagnostics import autocasts

# --- the pieces ---------------------------------------------------------------------------------


def total(x: Tensor) -> Tensor:
    """Sum of ``x`` over the processes, in place; with one process, ``x``."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of the masked entries on all processes."""
    return total((x * mask).sum()) / total(mask.sum())


def masked_whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the masked entries (of all processes); 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def token_rewards(
    score: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """Rewards (B, R): the k1 KL penalty on every token, plus ``score`` (B,) on the last real one."""
    rewards = -kl_coef * (logprobs - reference) * mask
    last = mask.sum(-1) - 1
    rewards[torch.arange(len(score)), last] += score
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> Tensor:
    """Generalised advantages (B, R), gamma 1, value 0 after the last real token (Schulman et al. 2016)."""
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + next_value - values[:, t]
        real = mask[:, t]
        advantages[:, t] = torch.where(real, delta + lam * next_advantage, 0.0)
        next_advantage = advantages[:, t]
        next_value = torch.where(real, values[:, t], 0.0)
    return advantages


def policy_loss(
    new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the clipped surrogate over tokens, number of clipped tokens, ratios (B, R)) (Schulman et al. 2017, eq. 7)."""
    ratio = (new - old).clamp(-20, 20).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -(torch.minimum(plain, clipped) * mask).sum()
    return loss, ((clipped < plain) & mask).sum(), ratio.detach()


def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Sum over tokens of half the larger of the plain and the clipped squared error."""
    near = old + (new - old).clamp(-clip, clip)
    return 0.5 * (torch.maximum((new - returns).square(), (near - returns).square()) * mask).sum()


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Non-negative estimate of KL(policy || reference) per token of the policy's own samples."""
    x = (logprobs - reference).clamp(-20, 20)
    return torch.expm1(-x) + x


def adapted(kl_coef: float, kl: float, target: float) -> float:
    """The next KL coefficient: proportional control with the error cut to +-.2 (Ziegler et al. 2019, sec. 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + 0.1 * error)


def part_of(rollout: Rollout, rows: Tensor) -> Rollout:
    """The given rows, without the columns that only longer prompts and responses need. No texts."""
    start = int(rollout.prompt_mask[rows].int().argmax(-1).min())
    length = int(rollout.mask[rows].sum(-1).max())
    prompt = rollout.prompt_mask[rows, start:]
    return Rollout(
        prompt,
        rollout.response[rows, :length],
        rollout.mask[rows, :length],
        rollout.logprobs[rows, :length],
        rollout.values[rows, :length],
        rollout.states[rows, start : start + prompt.shape[1] + length - 1],
        rollout.ended[rows],
        [],
    )


class ValueHead(nn.Linear):
    """V(state) from a detached hidden state, in float32; starts at 0 everywhere."""

    def __init__(self, width: int):
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.detach().float())


# --- the trainer --------------------------------------------------------------------------------


class PPO:
    """One arm. ``reward(records, texts)`` returns (totals (n,), parts: dict of (n,) arrays).

    ``params`` is a ``config.Params``; ``shield`` is attached to the optimizer for the trainer's life.
    Three generators (prompt order, sampling, minibatches) come from ``seed``, so two arms with equal
    seeds meet the same prompts and the same random numbers. Raises ``ValueError`` for a model without
    adapters, with dropout or with PAD = EOS, and for too few prompts.
    """

    def __init__(
        self,
        explainer: Explainer,
        reward,
        records: list[dict],
        params,
        seed: int,
        shield: Shield | None = None,
    ):
        _check(explainer, records, params)
        self.explainer, self.reward, self.records, self.params = explainer, reward, records, params
        self.value_head = ValueHead(explainer.lm.config.hidden_size).to(explainer.device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": explainer.adapter_parameters(), "lr": params.learning_rate},
                {"params": list(self.value_head.parameters()), "lr": params.value_lr},
            ],
            eps=1e-5,
            weight_decay=0.0,
        )
        self.shield = shield.attach(self.optimizer) if shield else None
        self._generators = {
            name: torch.Generator().manual_seed(seed * 3 + n)
            for n, name in enumerate(("order", "sampling", "minibatch"))
        }
        if shield and shield.replay:
            self._generators["replay"] = shield.replay.generator  # saved with the others
        self._queue: list[int] = []
        self.kl_coef = params.kl_coef
        self.rows: list[dict] = []
        self.steps_done = self.optimizer_steps = 0
        self.rank, self.processes = (
            (dist.get_rank(), dist.get_world_size())
            if dist.is_available() and dist.is_initialized()
            else (0, 1)
        )
        half = autocasts(params, explainer.device)
        self._precision = (
            (lambda: torch.autocast(explainer.device.type, torch.bfloat16)) if half else nullcontext
        )

    def train(
        self,
        steps: int,
        desc: str = "ppo",
        store: Store | None = None,
        log: Callable[[dict, int], None] | None = None,
    ) -> list[dict]:
        """Go on until ``steps`` iterations are done, from the newest checkpoint of ``store``; a row of statistics each.

        ``log(row, step)`` is told of every new row. The shield stays on the optimizer.
        """
        if store and (found := store.latest()):
            self.load_state(*found)
        for _ in track(range(self.steps_done, steps), desc):
            row = self.step()
            if log and self.rank == 0:
                log(row, self.steps_done)
            due = self.steps_done % self.params.checkpoint_every == 0 or self.steps_done == steps
            if store and due and self.rank == 0:
                store.save_step(self.steps_done, *self.state())
        return self.rows

    def step(self) -> dict:
        start, shield_before = perf_counter(), self.shield.seconds if self.shield else 0.0
        rollout, repeated = self._roll_out()
        sampled = perf_counter()
        total_reward, parts = self.reward(repeated, rollout.texts)
        mask, every = (
            rollout.mask,
            torch.ones_like(rollout.ended),
        )  # every: to take means over responses
        reward = torch.as_tensor(total_reward, dtype=torch.float32, device=mask.device)
        score = reward - self.params.missing_eos_penalty * ~rollout.ended
        if self.steps_done == 0:
            with torch.no_grad():
                self.value_head.bias.fill_(masked_mean(score, every))
            rollout.values = self.value_head.bias.detach() * mask
        with self.explainer.reference():
            reference = self._logprobs(rollout)
        rewards = token_rewards(score, rollout.logprobs, reference, mask, self.kl_coef)
        advantages = gae(rewards, rollout.values, mask, self.params.gae_lambda)
        returns = advantages + rollout.values
        update = self._update(rollout, masked_whiten(advantages, mask), returns)
        self.steps_done += 1
        center = masked_mean(returns, mask)
        spread, residual = (
            masked_mean((returns - center).square(), mask),
            masked_mean(advantages.square(), mask),
        )
        texts = len(repeated) * self.processes
        tokens = int(total(mask.sum()))
        self.rows.append(
            {
                "step": self.steps_done,
                "episodes": self.steps_done * texts,
                "reward": float(masked_mean(reward, every)),
                "score": float(masked_mean(score, every)),
                **{
                    f"reward_{name}": float(
                        masked_mean(torch.as_tensor(part, device=mask.device), every)
                    )
                    for name, part in parts.items()
                },
                "kl": float(masked_mean((k3(rollout.logprobs, reference) * mask).sum(-1), every)),
                "kl_coef": self.kl_coef,
                "surprisal": float(-masked_mean(rollout.logprobs, mask)),
                "length": tokens / texts,
                "eos_rate": float(masked_mean(rollout.ended.float(), every)),
                "advantage_std": float(
                    (residual - masked_mean(advantages, mask).square()).clamp(min=0).sqrt()
                ),
                "explained_variance": float(1 - residual / spread.clamp(min=1e-8)),
                **update,
                "generated_tokens_per_second": tokens / (sampled - start),
                "shield_seconds": (self.shield.seconds if self.shield else 0.0) - shield_before,
                "step_seconds": perf_counter() - start,
            }
        )
        if self.params.kl_target:
            self.kl_coef = adapted(self.kl_coef, self.rows[-1]["kl"], self.params.kl_target)
        return self.rows[-1]

    # Rollout

    def _next_records(self) -> list[dict]:
        """The next prompts, of all processes, of a random order that is drawn anew when it runs out."""
        n = self.params.prompts_per_step
        if len(self._queue) < n:
            self._queue = torch.randperm(
                len(self.records), generator=self._generators["order"]
            ).tolist()
        chosen, self._queue = self._queue[:n], self._queue[n:]
        return [self.records[i] for i in chosen]

    def _roll_out(self) -> tuple[Rollout, list[dict]]:
        """This process's share of the rollout, and the record of each of its rows."""
        share, samples = (
            self.params.prompts_per_step // self.processes,
            self.params.samples_per_prompt,
        )
        records = self._next_records()[self.rank * share : (self.rank + 1) * share]
        prompts = [prompt_ids(self.explainer, messages(r)) for r in records]
        self._skip_uniforms(self.rank * share * samples)
        with (
            self._precision() if self.explainer.device.type == "cuda" else nullcontext()
        ):  # on a CPU the sampler packs float32 weights
            rollout = sample(
                self.explainer,
                prompts,
                samples,
                self.params.max_new_tokens,
                self.params.temperature,
                self._generators["sampling"],
                self.value_head,
            )
        self._skip_uniforms((self.processes - 1 - self.rank) * share * samples)
        if self._precision is not nullcontext:
            rollout.logprobs = self._logprobs(rollout)
        return rollout, [r for r in records for _ in range(samples)]

    def _skip_uniforms(self, rows: int) -> None:
        """Pass over what ``sample`` would draw for rows of other processes."""
        torch.rand(
            rows,
            self.params.max_new_tokens,
            generator=self._generators["sampling"],
            dtype=torch.float64,
        )

    @torch.no_grad()
    def _logprobs(self, rollout: Rollout) -> Tensor:
        """``token_logprobs`` (B, R) by micro-batches, with the training code's precision."""
        found = torch.zeros_like(rollout.logprobs)
        for rows in torch.arange(len(found), device=found.device).split(self.params.micro_batch):
            part = part_of(rollout, rows)
            with self._precision():
                found[rows, : part.mask.shape[1]] = token_logprobs(
                    self.explainer, part, self.params.temperature
                )
        return found

    # Update

    def _update(self, rollout: Rollout, advantages: Tensor, returns: Tensor) -> dict:
        params, mine, steps, first_deviation = self.params, len(rollout.response), [], None
        size = mine * self.processes // params.minibatches
        for epoch in range(params.ppo_epochs):
            order = torch.randperm(mine * self.processes, generator=self._generators["minibatch"])
            for n, chosen in enumerate(order.split(size)):
                rows = chosen[chosen // mine == self.rank] % mine  # of this process; perhaps none
                self._set_rates(
                    (self.steps_done * params.ppo_epochs + epoch) * params.minibatches + n
                )
                statistics, deviation = self._minibatch_step(
                    rollout, rows.to(advantages.device), advantages, returns
                )
                steps.append(statistics)
                if first_deviation is None:
                    first_deviation = (
                        deviation  # sampler and training code must agree: ratio 1 before any step
                    )
            if (
                params.stop_kl
                and sum(s["approx_kl"] for s in steps[-params.minibatches :]) / params.minibatches
                > params.stop_kl
            ):
                break
        means = {key: sum(s[key] for s in steps) / len(steps) for key in steps[0]}
        return {
            **means,
            "epochs_skipped": params.ppo_epochs - 1 - epoch,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "ratio_first_minibatch_max_dev": first_deviation,
        }

    def _set_rates(self, planned: int) -> None:
        """Learning rates of optimizer step ``planned``, counted from 0 as if no epoch were ever skipped."""
        whole = self.params.ppo_steps * self.params.ppo_epochs * self.params.minibatches
        factor = max(1 - planned / whole, 0.0) if self.params.lr_schedule == "linear" else 1.0
        for group, rate in zip(
            self.optimizer.param_groups, (self.params.learning_rate, self.params.value_lr)
        ):
            group["lr"] = rate * factor

    def _minibatch_step(
        self, rollout: Rollout, rows: Tensor, advantages: Tensor, returns: Tensor
    ) -> tuple[dict, float]:
        names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "entropy")
        tokens = total(rollout.mask[rows].sum())
        sums, deviation = (
            torch.zeros(len(names), device=tokens.device),
            torch.zeros((), device=tokens.device),
        )
        self.optimizer.zero_grad(set_to_none=True)
        for some in rows.split(self.params.micro_batch) if len(rows) else ():
            part = part_of(rollout, some)
            mask, cut = part.mask, part.mask.shape[1]
            with self._precision():
                hidden = response_hidden(self.explainer, part)
                logp = self.explainer.log_softmax(hidden, self.params.temperature)
            new = logp.gather(-1, part.response[..., None])[..., 0].masked_fill(~mask, 0.0)
            pg, clipped, ratio = policy_loss(
                new, part.logprobs, advantages[some, :cut], mask, self.params.clip_range
            )
            vf = value_loss(
                self.value_head(hidden)[..., 0],
                part.values,
                returns[some, :cut],
                mask,
                self.params.value_clip,
            )
            ((pg + vf) / tokens).backward()
            with torch.no_grad():
                drift = ((ratio - 1 - (new - part.logprobs)) * mask).sum()
                entropy = -((logp.exp() * logp).sum(-1) * mask).sum()
                sums += torch.stack([pg, vf, clipped, drift, entropy])
                deviation = torch.maximum(deviation, ((ratio - 1).abs() * mask).max())
        self._sum_gradients()
        adapters = self.explainer.adapter_parameters()
        norm = nn.utils.clip_grad_norm_(adapters, self.params.max_grad_norm)
        if not torch.isfinite(norm):
            raise RuntimeError(
                f"step {self.steps_done + 1}: the gradient is not finite; lower learning_rate or kl_coef"
            )
        nn.utils.clip_grad_norm_(self.value_head.parameters(), self.params.max_grad_norm)
        self.optimizer.step()
        self.optimizer_steps += 1
        replay = self.shield.replay if self.shield else None
        norms = {"gradient_norm": float(norm), "replay_norm": replay.norm if replay else 0.0}
        return {**dict(zip(names, (total(sums) / tokens).tolist())), **norms}, float(
            _largest(deviation)
        )

    def _sum_gradients(self) -> None:
        """Over the processes, in one message; a process without rows contributes zeros."""
        if self.processes == 1:
            return
        parameters = [*self.explainer.adapter_parameters(), *self.value_head.parameters()]
        flat = total(
            torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
            )
        )
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)

    # Checkpoints: all that decides the next step

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON) for ``load_state``: adapter, value head, optimizer, generators; counters, queue, rows."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            **{f"adapter/{k}": v for k, v in self.explainer.adapter_state().items()},
            **{f"value/{k}": v for k, v in self.value_head.state_dict().items()},
            **{f"optimizer/{n}/{k}": v for n, entry in moments.items() for k, v in entry.items()},
            **{f"generator/{k}": g.get_state() for k, g in self._generators.items()},
        }
        return tensors, {
            "steps_done": self.steps_done,
            "optimizer_steps": self.optimizer_steps,
            "kl_coef": self.kl_coef,
            "queue": self._queue,
            "rows": self.rows,
        }

    def load_state(self, tensors: dict[str, Tensor], plain: dict) -> None:
        parts = {kind: {} for kind in ("adapter", "value", "optimizer", "generator")}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = tensor
        self.explainer.load_adapter(parts["adapter"])
        self.value_head.load_state_dict(parts["value"])
        moments: dict[int, dict] = {}
        for name, tensor in parts["optimizer"].items():
            n, key = name.split("/")
            moments.setdefault(int(n), {})[key] = tensor
        self.optimizer.load_state_dict(
            {"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )
        for name, generator in self._generators.items():
            generator.set_state(parts["generator"][name])
        self.steps_done, self.optimizer_steps, self.kl_coef = (
            plain["steps_done"],
            plain["optimizer_steps"],
            plain["kl_coef"],
        )
        self._queue, self.rows = plain["queue"], plain["rows"]


def _check(explainer: Explainer, records: list[dict], params) -> None:
    if not explainer.adapter_parameters():
        raise ValueError("the explainer has nothing to train; call add_lora first")
    if len(records) < params.prompts_per_step:
        raise ValueError(
            f"prompts_per_step={params.prompts_per_step}, but there are only {len(records)} prompts"
        )
    if explainer.pad_id == explainer.eos_id:
        raise ValueError(
            "the padding token is the end token: a policy could not learn to stop; choose another pad_id"
        )
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in explainer.lm.modules()) or getattr(
        explainer.lm.config, "attention_dropout", 0
    ):
        raise ValueError(
            "the model has dropout: old and new log-probabilities would differ by chance; set it to 0"
        )


def _largest(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x
