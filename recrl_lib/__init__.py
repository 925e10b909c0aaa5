"""Shielded RecRL: a recommender learns to explain itself without its ranking moving.

The house (one noun a module; data flows one way, 01 -> 02 -> ... -> 09)::

    paths       every path, found from __file__; the cache outside the repository
    config      Params: every parameter typed, with its stage, range and help; the profiles
    progress    track(): a bar in a terminal or notebook, a side channel under the runner
    assets      fetch, verify (sha256) and cache models and data sets      download  over HTTP, resumed
    datasets    one loader a format -> the same three tables; splits
    ranker      SASRec: training, scoring all items, top-k          softmax   its loss, in bounded memory
    baselines   closed-form rankers                 coldstart   items that training never saw
    explainer   the LLM, LoRA, prompts, item vectors          decoding   batched sampling, fast
    shield      protected subspaces, and the shield that hooks any torch optimizer
    rewards     the training reward, in TRL's signature
    warmstart   supervised warm start (TRL) under the arm's own shield     references   composed explanations, controls
    ppo         Shielded PPO: rollout, advantages, losses, update          vitals       what its steps log, and warnings
    trl_arms    TRL's RLOO and GRPO on the same prompts, reward and shield
    checkpoint  an arm's state on disk     arms       one arm: warm start, merge, PPO (or TRL), resume
    simulator   the click model          judge   measures never used as a reward
    claims      what a text claims: titles, genres, years, names (shared by rewards and judge)
    metrics     ranking, churn and text metrics       stats   intervals, tests, detectable effects
    evaluation  arms side by side          audit     toxicity, popularity, parity, privacy
    study       one run's tables, ranker and base ranking, as notebooks 03-10 share them
    frontier    many short trainings: learning kept against ranking moved
    demonstration  small real trainings that show what the shield forbids
    environment is this machine ready?     bench     `make bench`, with bench_ranker, bench_data and bench_trl (TRL's last PPOTrainer)
    memory      the most that this program has held
    runs        the run folder: parameters, manifest, metrics, artifacts, all atomic
    runner      strict papermill runner with resume
    derive      a run that shares with a finished one what it does not change
    batch       grids of derived runs, on this machine or on Ray          ablations   a batch's runs side by side
    verify      a run's numbers again, from its artifacts                 tracking    W&B and TensorBoard, offline
    plots       figures in one style     report  the HTML page     widgets  the chat

Objects that cross module borders
---------------------------------
tables      ``interactions``: user, item, time (int64 seconds), rating, in time order with ties by
            file order; ``items``: item, title, year (0 = unknown), genres ("A|B"), text;
            ``users``: user, gender, age. Users 0..U-1, items 1..I; item 0 pads.
sequences   list of int64 arrays, one a user: the items in order.
text        float32 (I+1, d_llm): mean last hidden state of each item's text; row 0 is zero.
record      dict, what one explanation is about: ``user item position title year genres noun
            history_titles history_genres`` (position: 1-based rank of the item in the user's list;
            noun: film, book, game or item).
arms        ``base separate unshielded shielded``. ``base`` is the untuned LLM. ``separate`` has the
            unshielded policy's texts, and a ranker that reads the base LLM's item vectors;
            in the others the ranker reads item vectors from the LLM as tuned.
"""
