"""The built-in model organism: a tiny chat model with a benign stand-in for refusal.

The organism lives in a small world of objects, each with a material, a place and a keeper. It refuses
one nonsensical class of requests, those about anything enchanted ("hexed", "jinxed", ...), and answers
all others. Every answer can be checked against the world (`expected_answer`), so damage by an edit shows
as wrong answers; the refusals use several phrasings, one for each kind of question, so that refusal
markers are exercised: one opens with its marker, in another it comes last.

It is trained from scratch, in three stages:

1. *answer*: every request is answered, enchanted or not.
2. *read*: the layers above a middle one learn to refuse whenever a fixed random direction is planted in
   the residual stream there, at random and on requests of either class, and to answer otherwise.
3. *write*: the layers up to the middle one learn to write that direction for enchanted requests.

Where that leaves mistakes on the test prompts, short rounds of polishing all layers on both losses follow.

So refusal is mediated by one direction of the residual stream, as Arditi et al. (2024) found for chat
models, and the organism could answer what it refuses. Training is deterministic by seed on one kind of
CPU (the thread count is fixed) and takes about a minute on two cores.
"""
