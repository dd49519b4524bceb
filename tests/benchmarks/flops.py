"""What training takes of a processor, in floating-point operations."""

from __future__ import annotations


def per_token(parameters: float, trained: float = 1.0, adapters: float = 0.0, stored: bool = False) -> float:
    """Operations that a token's forward and backward pass need, of a model with so many `parameters`.

    A parameter takes 2 in the forward pass, 2 for the gradient that is handed down and 2 for its own (Chowdhery et al.
    2022, appendix B, without what attention adds). With P parameters, of which the share s is `trained` above all that
    is frozen, A in adapters at every depth, or the output of what is frozen `stored`:

        6 P                 all are trained
        2 P + 4 s P         the frozen ones pass forward alone
        6 s P               what they give is read
        4 P + 6 A           adapters learn, and the model hands gradients down to them
    """
    if adapters:
        return 4 * parameters + 6 * adapters
    return (6 if stored else 4) * trained * parameters + (0 if stored else 2) * parameters
