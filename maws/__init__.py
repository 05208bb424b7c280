"""MAE pre-pretraining, weakly supervised pretraining and LiT (MAWS, Singh et al., 2023, arXiv 2303.13496)."""

__version__ = "0.1.0"
