# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What hurts is the coupling
#
# A separable model has nonlinear weights θ and linear weights W.
# You will see gradient descent, alternating directions and variable projection
# minimise three small quadratics in one θ and one w.
# You will learn why two variables that are easy to train one at a time can be hard
# to train together, and why eliminating w helps where alternating does not.
#
# The three methods are a few lines of NumPy each. The library comes in at the end.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import varprox as vp

jax.config.update("jax_enable_x64", True)
QUICK = "VARPROX_QUICK" in os.environ  # the test suite sets it
plt.rcParams |= {
    "figure.constrained_layout.use": True,
    "figure.dpi": 90,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
COLOURS = {
    "GNvpro": "#0072b2",
    "Broydenvpro": "#8b1a1a",
    "LBFGSvpro": "#d55e00",
    "slimTrain": "#e69f00",
    "Adam": "#009e73",
    "L-BFGS": "#555555",
    "GN": "#cc79a7",
}

# %% [markdown]
# ## Three quadratics
#
# Every problem is f(x) = ½ xᵀA x with x = (θ, w), so the minimum is at zero.
# Two numbers matter here:
#
# - its condition number κ, the ratio of its eigenvalues;
# - the coupling ρ = |A_θw| / √(A_θθ A_ww), which is 0 if θ and w do not interact
#   and approaches 1 as the matrix becomes singular.
#
# The second and the third matrix have the same eigenvalues. The third is the second,
# turned by 45°, and so is its start. The blocks are single numbers here, A_θθ and A_ww,
# so every block has condition number 1.


# %%
def turned(eigenvalues, degrees):
    """The symmetric matrix with these eigenvalues, and its eigenvectors."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    vectors = np.array([[c, -s], [s, c]])
    return vectors @ np.diag(eigenvalues) @ vectors.T, vectors


def coupling(A):
    return abs(A[0, 1]) / np.sqrt(A[0, 0] * A[1, 1])


EIGENVALUES = np.array([0.05, 1.95])
START = np.array([-2.0, 0.2])  # along the eigenvectors; a slow one for gradient descent
problems = {}
for name, eigenvalues, degrees in [
    ("well-conditioned", np.array([0.7, 1.3]), -45),
    ("ill-conditioned", EIGENVALUES, 0),
    ("ill-conditioned, coupled", EIGENVALUES, -45),
]:
    A, vectors = turned(eigenvalues, degrees)
    problems[name] = A, vectors @ START

print(f"{'':26}    A_θθ    A_ww    A_θw       κ       ρ")
for name, (A, _) in problems.items():
    numbers = A[0, 0], A[1, 1], A[0, 1], np.linalg.cond(A), coupling(A)
    print(f"{name:26}" + "".join(f"{number:8.2f}" for number in numbers))

# %% [markdown]
# ## The methods
#
# The code is written for any number k of entries in θ, since we use it for 20 of them
# below. Each function takes one step and returns the points it passes.
# `fraction` shortens the steps: 1 for full steps, ½ for half steps.


# %%
def gradient_descent(A, x, k, fraction):
    """The step along the gradient to the minimum on that line."""
    g = A @ x
    return [x - fraction * (g @ g) / (g @ A @ g) * g]


def scaled_descent(A, x, k, fraction):
    """Gradient descent in variables in which both blocks of A are the identity."""
    g = A @ x
    blocks = A.copy()
    blocks[:k, k:] = blocks[k:, :k] = 0
    d = np.linalg.solve(blocks, g)
    return [x - fraction * (g @ d) / (d @ A @ d) * d]


def alternating(A, x, k, fraction):
    """The minimum over θ for fixed w, then the minimum over w for the new θ."""
    theta, w = x[:k], x[k:]
    best_theta = -np.linalg.solve(A[:k, :k], A[:k, k:] @ w)
    theta = theta + fraction * (best_theta - theta)
    best_w = -np.linalg.solve(A[k:, k:], A[k:, :k] @ theta)
    return [np.r_[theta, w], np.r_[theta, w + fraction * (best_w - w)]]


def projection(A, x, k, fraction):
    """Gradient descent on the reduced quadratic in θ, with w = W(θ) throughout."""
    theta = x[:k]
    d_w = -np.linalg.solve(A[k:, k:], A[k:, :k])  # W(θ) = d_w θ
    on_curve = np.r_[theta, d_w @ theta]
    g = (A @ on_curve)[:k]  # in θ; on the curve the gradient in w is zero
    along = np.r_[g, d_w @ g]  # a change of θ takes W(θ) with it
    step = fraction * (g @ g) / (along @ A @ along)
    return [on_curve, on_curve - step * along]


METHODS = {
    "gradient descent": gradient_descent,
    "alternating": alternating,
    "projection": projection,
    "block-scaled descent": scaled_descent,
}
METHOD_COLOURS = dict(
    zip(METHODS, ["#222222", "#b8860b", COLOURS["GNvpro"], "#7b3294"], strict=True)
)

# %% [markdown]
# An iteration is a gradient step, a sweep over both variables, or a step in θ with
# W(θ) solved for. We count iterations until f is 1e-8 of its first value.


# %%
def minimise(method, A, x, k=1, fraction=1.0):
    """All points on the way, and the number of iterations."""
    points, iterations, goal = [x], 0, 1e-8 * (x @ A @ x)
    while points[-1] @ A @ points[-1] > goal:
        points += method(A, points[-1], k, fraction)
        iterations += 1
    return np.array(points), iterations


print(f"{'':26}{'step':>6}" + "".join(f"{name:>22}" for name in METHODS))
for name, (A, start) in problems.items():
    for fraction in (1.0, 0.5):
        counts = [minimise(m, A, start, fraction=fraction)[1] for m in METHODS.values()]
        print(f"{name:26}{fraction:6}" + "".join(f"{count:22}" for count in counts))

# %% [markdown]
# ## The paths
#
# Rows are problems, columns are methods. Shading is f, darker where it is larger. The
# dot is the start, the star the minimum.
# The dashed line is w = W(θ), the floor of the valley: the best w for each θ.


# %%
def draw_paths(fraction):
    figure, axes = plt.subplots(3, 3, figsize=(7.2, 7.4), sharex=True, sharey=True)
    grid = np.linspace(-2.4, 2.4, 201)
    mesh = np.stack(np.meshgrid(grid, grid), axis=-1)
    for row, (name, (A, start)) in zip(axes, problems.items(), strict=True):
        values = 0.5 * np.einsum("...i,ij,...j", mesh, A, mesh)
        for ax, method in zip(row, list(METHODS)[:3], strict=True):
            path, count = minimise(METHODS[method], A, start, fraction=fraction)
            ax.contourf(grid, grid, values, np.geomspace(1e-3, 16, 8), norm="log",
                        cmap="Greys", alpha=0.3, extend="both")  # fmt: skip
            ax.plot(grid, -A[0, 1] / A[1, 1] * grid, "k--", linewidth=0.8)
            ax.plot(*path.T, ".-", color=METHOD_COLOURS[method], linewidth=1.6)
            ax.plot(*start, "o", color="k", markersize=6)
            ax.plot(0, 0, "*", color="k", markersize=10)
            ax.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), aspect="equal")
            ax.grid(False)
            iterations = "iteration" if count == 1 else "iterations"
            ax.set_title(f"{method}\n{count} {iterations}", fontsize=10)
        row[0].set_ylabel(f"{name}\n\nw")
    for ax in axes[-1]:
        ax.set_xlabel("θ")
    plt.show()


# %% tags=["thumbnail"]
draw_paths(1.0)

# %% [markdown]
# Read the figure by columns:
#
# - **Gradient descent** zigzags as soon as the valley is narrow. It takes as many
#   iterations on the third problem as on the second, because turning the plane changes
#   nothing for it.
# - **Alternating** ends the second problem in one sweep, and takes the most iterations
#   of all on the third. It may only move along the axes, and the valley does not.
# - **Projection** first drops to the dashed line and then follows it. One step along
#   the line suffices, whatever the valley looks like.
#
# In the table, **block-scaled descent** ends the second problem in one step, too. It
# gains nothing on the third, where both blocks are the number 1 already. Good blocks
# are no help against the coupling between them.
#
# ## Half steps
#
# An exact line search is rare in practice. With half steps every method is slower, but
# projection no more on the third problem than on the others: a half step halves the
# error of θ, and W(θ) follows. Alternating now takes several times as many sweeps as it
# did with full steps.

# %%
draw_paths(0.5)

# %% [markdown]
# ## The same eigenvalues, turned
#
# Between the second problem and the third lies only an angle. As it grows from 0° to
# 45°, κ stays the same and ρ grows from 0 to 0.95.

# %%
angles = np.linspace(0, 45, 4 if QUICK else 19)
counts = {name: np.zeros((2, len(angles)), int) for name in METHODS}
for j, angle in enumerate(angles):
    A, vectors = turned(EIGENVALUES, -angle)
    for name, method in METHODS.items():
        for i, fraction in enumerate((1.0, 0.5)):
            found = minimise(method, A, vectors @ START, fraction=fraction)
            counts[name][i, j] = found[1]
assert np.all(counts["projection"][0] == 1)
assert np.all(counts["projection"][1] <= 14)

figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.4), sharey=True)
for i, (ax, title) in enumerate(zip(axes, ("full steps", "half steps"), strict=True)):
    for name, lines in counts.items():
        ax.semilogy(angles, lines[i], ".-", color=METHOD_COLOURS[name], label=name)
    ax.set(title=title, xlabel="angle of the valley, degrees")
axes[0].set_ylabel("iterations")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# The condition number alone does not tell how hard the problem is for alternating or
# for block-scaled descent. The coupling does: a full sweep of alternating multiplies
# the error of w by ρ². Projection does not see the coupling.
#
# Why does alternating fail? After its first sweep it always starts at w = W(θ), as
# projection does. But it chooses its step in θ as if w were to stay there. It therefore
# takes A_θθ for the curvature, where the reduced problem has A_θθ (1 − ρ²), and its
# step is too short by this factor.
#
# ## More than one θ
#
# With one θ the reduced problem has one variable, so an exact step ends it. With more
# of them, projection leaves a quadratic with the matrix
#
# $$S = A_{θθ} - A_{θw} A_{ww}^{-1} A_{wθ},$$
#
# the Schur complement. Its eigenvalues lie between the extreme ones of A, so
# κ(S) ≤ κ(A): projection never makes the conditioning worse. Here are 20 θ and 20 w.
# Both blocks are the identity, and the couplings range from 0 to 0.95.

# %%
k = 20
rng = np.random.default_rng(0)
left, right = (np.linalg.qr(rng.normal(size=(k, k)))[0] for _ in range(2))
C = left @ np.diag(np.linspace(0, 0.95, k)) @ right.T
A = np.block([[np.eye(k), C], [C.T, np.eye(k)]])
S = A[:k, :k] - A[:k, k:] @ np.linalg.solve(A[k:, k:], A[k:, :k])
assert np.linalg.cond(S) <= np.linalg.cond(A)

start = rng.normal(size=2 * k)
print(f"κ(A) = {np.linalg.cond(A):.1f}, κ(S) = {np.linalg.cond(S):.1f}")
for name, method in METHODS.items():
    print(f"{name:22}{minimise(method, A, start, k)[1]:4} iterations")

# %% [markdown]
# Projection takes the fewest iterations, but no longer one: S has a condition number of
# its own. This is why the methods of the library do not stop at gradient descent on the
# reduced problem. They use its curvature.
#
# ## The same in a model
#
# Near a minimum the objective of every separable model is such a quadratic.
# Take w exp(−θ t), fitted at times t from 1 to 2. A larger amplitude w can make up for
# a larger rate θ, which is what coupling means.
#
# `vp.reduced_objective` gives Φ_red(θ) = Φ(W(θ), θ) together with W(θ).

# %%
times = jnp.linspace(1, 2, 20)
targets = 2 * jnp.exp(-1.0 * times)[:, None]
data = (times, targets)


def features(theta, times):
    return jnp.exp(-theta * times[:, None])  # (batch, 1)


problem = vp.Problem(
    vp.Separable(features, head=vp.dense(bias=False)), loss=vp.least_squares()
)
reduced = vp.reduced_objective(problem)
value, w_start = reduced(jnp.array([1.5]), data)
print(f"θ = 1.5: W(θ) = {w_start.item():.3f}, Φ_red(θ) = {value:.2e}")


# %% [markdown]
# The curvature of Φ_red is the Schur complement of the Hessian of Φ. The library does
# not form that Hessian: `vp.newton` gives products with the Schur complement.


# %%
def phi(x):
    theta, w = x[:1], x[1:, None]
    return problem.loss.value(vp.predict(problem, theta, w, times), targets)


hessian = jax.hessian(phi)(jnp.array([1.0, 2.0]))  # at the minimum
schur = hessian[0, 0] - hessian[0, 1] ** 2 / hessian[1, 1]
product = vp.newton(problem, jnp.array([1.0]), data).matvec(jnp.array([1.0]))
assert jnp.allclose(product, schur)
print(f"coupling ρ              {coupling(np.asarray(hessian)):.4f}")
print(f"curvature of Φ along θ  {hessian[0, 0]:.2e}")
print(f"curvature of Φ_red      {schur:.2e}; by vp.newton {product.item():.2e}")

# %% [markdown]
# Left: Φ over both weights, with the curve W(θ) and the line on which w stays where it
# is. Right: the objective along both. The minimum of the narrow parabola is where
# alternating goes from here. Projection sees the wide valley.

# %%
thetas, ws = np.linspace(0.2, 2.2, 121), np.linspace(0.2, 7, 121)
values = jax.vmap(jax.vmap(phi))(jnp.stack(jnp.meshgrid(thetas, ws), axis=-1))
curve, w_curve = jax.vmap(lambda theta: reduced(theta[None], data))(jnp.array(thetas))
line = jnp.column_stack([thetas, np.full_like(thetas, w_start.item())])
w_stays = {"color": METHOD_COLOURS["alternating"], "label": "w stays at W(1.5)"}
w_follows = {"color": METHOD_COLOURS["projection"], "label": "w = W(θ)", "ls": "--"}

figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.8))
levels = np.geomspace(1e-6, 1, 13)
left.contour(thetas, ws, values, levels, colors="#999999", linewidths=0.6)
left.plot(thetas, w_curve[:, 0, 0], **w_follows)
left.plot(*line.T, **w_stays)
left.plot(1.5, w_start.item(), "ko", markersize=6)
left.plot(1, 2, "k*", markersize=10)
left.set(xlabel="θ", ylabel="w", ylim=(0.2, 7))
left.grid(False)
right.plot(thetas, curve, **w_follows)
right.plot(thetas, jax.vmap(phi)(line), **w_stays)
right.plot(1.5, value, "ko", markersize=6)
right.plot(1, 0, "k*", markersize=10)
right.set(xlabel="θ", ylabel="objective Φ", ylim=(-5e-4, 0.012))
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# `vp.fit` trains θ on the reduced objective. It needs a start for θ and none for w.

# %%
solution = vp.fit(problem, jnp.array([1.5]), data, epochs=50)
assert solution.status == vp.Status.CONVERGED
print(solution)

# %% [markdown]
# ## What to change
#
# - `EIGENVALUES = np.array([0.005, 1.995])` and `START = np.array([-2.0, 0.02])`: the
#   valley is ten times as narrow. On the third problem gradient descent and alternating
#   take about ten times as many full steps. Projection takes one, as before.
# - `START = np.array([-2.0, 1.0])`: gradient descent with full steps is much faster.
#   It is slow where both eigenvectors have a like share in the gradient. The other two
#   methods hardly notice.
# - `draw_paths(0.9)`: a slightly shorter step suits gradient descent and harms
#   alternating.
# - `np.linspace(0, 0.95, k)` to `np.r_[np.zeros(k - 1), 0.999]`: one coupling is strong
#   and the others are none. Projection takes two iterations, alternating over a
#   thousand.
# - `jnp.linspace(1, 2, 20)` to `jnp.linspace(3, 4, 20)`: the coupling in the model is
#   stronger, and the gap between the two parabolas wider.
#
# ## What to try next
#
# - `02_geometry`: what features and last layer do while a classifier is trained.
# - `09_curve_fitting`: sums of exponentials and of Gaussians over many data sets.
# - `vp.gnvpro`, `vp.broydenvpro` and `vp.lbfgsvpro`: methods that use the curvature of
#   the reduced problem.
