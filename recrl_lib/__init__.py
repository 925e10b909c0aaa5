"""Shielded RecRL: a recommender learns to explain itself without its ranking moving.

Packages, each of which imports only those below it; data flows 01 -> 02 -> ... -> 09::

    pipeline     run, batch, verify and publish the notebooks
    evaluation   results, ranking change, clicks, statistics, audit, ablations, findings
    training     PPO, the arms, warm start, TRL's trainers        chat   the widget of notebook 10
    plots        one style of figures
    study        a run's tables, ranker and base ranking, as notebooks 03-10 share them
    scoring      what a text claims, what moved the ranker, the reward, the independent judge
    ranker       SASRec, baselines, ranking metrics
    shield       protected subspaces and the projection; usable alone with any torch optimizer
    explainer    the LLM with LoRA, prompts, sampling, item vectors
    data         one loader a format, three tables, splits
    environment  is this machine ready?
    assets       downloaded models and data sets, verified
    runs         the run folder; measures: the table of results; provenance: a stage's key
    params       every parameter, with its profiles        paths   progress

Objects that several packages share:

tables      ``interactions``: user, item, time (int64 seconds), rating, in time order; ``items``:
            item, title, year (0 = unknown), genres ("A|B"), text; ``users``: user, gender, age.
            Users are 0..U-1, items 1..I; item 0 pads.
sequences   A list of int64 arrays, one a user: the items in order.
item vectors  float32 (I + 1, d_llm): mean last hidden state of each item's text; row 0 is zero.
record      A dict, what one explanation is about: user, item, position (place in the user's list,
            from 1), title, year, genres, noun, history_titles, history_genres, history_weights:
            what moved the ranker, history_similarity, evidence: what the prompt shows of weights.
            Of a follow-up question also chat: the messages after the opening question, listed: the
            user's ten, best first, and the fields of ``scoring.intents``.
arms        ``base``: the untuned LLM. ``separate``: the unshielded policy's texts beside a ranker
            that reads the base LLM's item vectors. ``unshielded``, ``shielded``: one model for
            both, so the ranker reads item vectors of the LLM as tuned.
"""
