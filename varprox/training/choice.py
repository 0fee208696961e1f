"""Which methods `fit` runs where it is given a problem."""

from functools import partial
from typing import Any

import jax

from varprox.methods.form_choice import select_form, usable
from varprox.methods.forms import Form
from varprox.methods.gnvpro import gnvpro
from varprox.methods.method import Method
from varprox.methods.quasi_newton import MAX_BYTES, broydenvpro, bytes_of_inverse, lbfgsvpro
from varprox.problem.data import check_data
from varprox.problem.model import Problem
from varprox.problem.traits import derivatives

# Bytes of an inverse Hessian that is kept unasked where pairs would be whitened. Its products take
# time: on Indian Pines steps of Broydenvpro were twice as long as those of LBFGSvpro with 4168
# weights, where it led in the end, and five times as long with 10,128.
WHOLE = 2**28
# Weights, up to which each may have its pass in every step where samples are coupled. In the zoo
# problems with 2 and 3 ended sooner so than by gradients, one with 40 two to three times as high.
FEW = 20


def default_methods(problem: Problem, theta: Any, data: tuple) -> list[Method]:
    """The methods for a problem, each of which is run where the one before has stalled."""
    theta, data = check_data(problem, theta, data, full_batch=True)
    forms = usable(problem, theta, data[0])
    # Without a form features may have a derivative in reverse, and couple samples.
    reverse = derivatives(problem, theta, data[0])[1] if not forms else forms != (Form.FORWARD,)
    # Where samples are coupled pairs are not whitened, and the whole is worth more.
    most = WHOLE if Form.DENSE in forms else MAX_BYTES
    by_gradients = broydenvpro if bytes_of_inverse(theta) <= most else lbfgsvpro
    if reverse and not forms:
        return [by_gradients(problem)]
    form = select_form(problem, theta, data, allowed=forms)
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    if reverse and (form is Form.KRYLOV or (form is Form.FORWARD and size > FEW)):
        return [by_gradients(problem)]
    method = gnvpro(problem)
    method = method._replace(init=partial(method.init, form=form))
    return [method, by_gradients(problem)] if reverse else [method]
