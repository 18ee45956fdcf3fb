"""abliteration-job: directional ablation of language models as an unattended batch job."""

__version__ = "0.2.0"
