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
# # Curve fitting: many data sets, common rates
#
# Sums of exponentials and of Gaussians are separable models with a handful of nonlinear
# weights. You will fit them to many data sets at once, with weights, gaps and standard
# errors, and check the errors against SciPy and against repeated experiments.
# You will learn what the library does for curve fitting, and what is left to you.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

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
# ## One column for each data set
#
# Twelve samples decay with the same two rates. Each has its own amplitudes and its own
# constant background:
#
# $$y_s(t) = W_{1s} e^{-k_1 t} + W_{2s} e^{-k_2 t} + W_{3s}.$$
#
# The rates are θ; we take their logarithms, which keeps them positive. The amplitudes
# are the columns of W, one for each sample. Early readings are taken with a short
# exposure, so their noise is five times as large.

# %%
RATES, SAMPLES = np.array([0.3, 1.2]), 12
rng = np.random.default_rng(0)
times = np.linspace(0.1, 10, 60)  # minutes
sigma = np.where(times < 2, 0.05, 0.01)
amplitudes = rng.uniform(0.5, 2, (3, SAMPLES))


def decays(theta, times):
    """Both exponentials and the constant, (times, 3)."""
    curves = jnp.exp(-times[:, None] * jnp.exp(theta))
    return jnp.column_stack([curves, jnp.ones_like(times)])


exact = np.asarray(decays(np.log(RATES), times)) @ amplitudes  # (times, samples)
observed = exact + sigma[:, None] * rng.normal(size=exact.shape)

# %% [markdown]
# ## Weights
#
# Readings that are known well should count more. Weights are the third part of the
# data: one for each row, or one for each entry of the targets. They multiply the
# squares. The right weight of a reading with standard deviation σ is 1/σ².

# %%
problem = vp.Problem(
    vp.Separable(decays, head=vp.dense(bias=False)), loss=vp.least_squares()
)
start = jnp.log(jnp.array([0.1, 3.0]))
unweighted = times, observed
weighted = times, observed, 1 / sigma**2

unweighted_fit = vp.fit(problem, start, unweighted, epochs=100)
fit = vp.fit(problem, start, weighted, epochs=100)
assert fit.status == unweighted_fit.status == vp.Status.CONVERGED
print(fit)
print(f"\nrates: true {RATES}, unweighted {np.exp(unweighted_fit.theta).round(3)}, "
      f"weighted {np.exp(fit.theta).round(3)}")  # fmt: skip

# %% [markdown]
# Divided by their standard deviations, the residuals should look like noise of size
# one.

# %% tags=["thumbnail"]
predicted = vp.predict(problem, fit.theta, fit.w, times)
figure, (above, below) = plt.subplots(
    2, 1, figsize=(7.2, 5), sharex=True, height_ratios=(2.5, 1)
)
colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, SAMPLES))
for sample in range(SAMPLES):
    above.plot(times, observed[:, sample], ".", color=colours[sample], markersize=4)
    above.plot(times, predicted[:, sample], color=colours[sample], linewidth=1)
    residuals = (observed[:, sample] - predicted[:, sample]) / sigma
    below.plot(times, residuals, ".", color=colours[sample], markersize=4)
above.set(ylabel="signal", title=f"{SAMPLES} samples, two common rates")
below.set(xlabel="time, minutes", ylabel="residual / σ", ylim=(-5, 5))
plt.show()

# %% [markdown]
# ## Standard errors
#
# With r the weighted residuals and J their Jacobian in all weights, (θ, W), the
# covariance of the estimates is s² (JᵀJ)⁻¹. Here s² is the sum of squares divided by
# the number of observations less the number of weights. `vp.covariance` computes it. J
# includes W: errors of θ alone, with W held fixed, would be too small.

# %%
covariance = vp.covariance(problem, fit, weighted)
rates = np.exp(fit.theta)
rate_errors = rates * covariance.theta_std  # dk = k dθ for k = exp θ
for k, (rate, error) in enumerate(zip(rates, rate_errors, strict=True), start=1):
    print(f"k_{k} = {rate:.4f} ± {error:.4f} per minute")

# %% [markdown]
# The oracle is `scipy.optimize.curve_fit`, which knows nothing of columns: it takes all
# rates and amplitudes as one vector. Its errors agree, on all samples and on one.


# %%
def by_scipy(observed, theta, w):
    """Estimates and standard errors of SciPy, shaped like θ and W."""
    first, restore = ravel_pytree((theta, w))

    def model(times, *weights):
        theta, w = restore(jnp.array(weights))
        return np.asarray(decays(theta, times) @ w).ravel()

    found, covariance = scipy.optimize.curve_fit(
        model, jnp.asarray(times), observed.ravel(), first,
        sigma=np.repeat(sigma, observed.shape[1]), ftol=1e-12, xtol=1e-12,
    )  # fmt: skip
    return restore(found), restore(np.sqrt(np.diag(covariance)))


(theta, w), errors = by_scipy(observed, fit.theta, fit.w)
np.testing.assert_allclose(theta, fit.theta, rtol=1e-4)
np.testing.assert_allclose(errors[0], covariance.theta_std, rtol=1e-4)
np.testing.assert_allclose(errors[1], covariance.w_std, rtol=1e-4)

alone = [by_scipy(observed[:, [s]], fit.theta, fit.w[:, [s]]) for s in range(SAMPLES)]
(theta, w), errors = alone[0]
one = times, observed[:, [0]], 1 / sigma**2
ours = vp.covariance(problem, fit._replace(theta=theta, w=w), one)
np.testing.assert_allclose(errors[0], ours.theta_std, rtol=1e-4)
np.testing.assert_allclose(errors[1], ours.w_std, rtol=1e-4)

# %% [markdown]
# What is gained by common rates? Each sample fitted alone gives its own rates, with
# large errors. The fit to all samples has much smaller ones.

# %%
thetas = np.array([*(theta for (theta, _), _ in alone), fit.theta])
errors = np.array([*(errors[0] for _, errors in alone), covariance.theta_std])
low, middle, high = (np.exp(thetas + shift * errors) for shift in (-1, 0, 1))
colours = [*SAMPLES * ["#555555"], COLOURS["GNvpro"]]
figure, axes = plt.subplots(2, 1, figsize=(7.2, 4.6), sharex=True)
for k, ax in enumerate(axes):
    ax.vlines(range(SAMPLES + 1), low[:, k], high[:, k], colors=colours, linewidth=2)
    ax.scatter(range(SAMPLES + 1), middle[:, k], s=16, c=colours)
    ax.axhline(RATES[k], color="k", linestyle="--", linewidth=1)
    ax.set_ylabel(f"$k_{k + 1}$, 1 / minute")
labels = [*(f"{sample + 1}" for sample in range(SAMPLES)), "all"]
axes[1].set_xticks(range(SAMPLES + 1), labels)
axes[1].set_xlabel("sample fitted alone, and all together; dashed: the true rate")
plt.show()

# %% [markdown]
# ### Are the errors right?
#
# A standard error is the scatter that repeated experiments would have. On a computer
# they can be repeated. New data of the same shapes do not compile anything again.

# %%
REPEATS = 2 if QUICK else 100
schemes = {"unweighted": np.ones_like(times), "weighted": 1 / sigma**2}
found = {name: [] for name in schemes}
for _ in range(REPEATS):
    again = exact + sigma[:, None] * rng.normal(size=exact.shape)
    for name, weights in schemes.items():
        repeat = times, again, weights
        solution = vp.fit(problem, start, repeat, epochs=100)
        errors = vp.covariance(problem, solution, repeat).theta_std
        found[name].append((solution.theta, errors))

print(f"{'errors of log k':16}{'scatter':>20}{'mean standard error':>24}")
for name, pairs in found.items():
    estimates, errors = (np.array(column) for column in zip(*pairs, strict=True))
    scatter, mean = estimates.std(axis=0, ddof=1), errors.mean(axis=0)
    print(f"{name:16}{str(scatter.round(4)):>20}{str(mean.round(4)):>24}")
if not QUICK:
    np.testing.assert_allclose(mean, scatter, rtol=0.3)  # of the weighted fits

# %% [markdown]
# With the right weights the scatter is smaller, and the standard errors agree with it.
# Without them the formula is wrong, because it takes all readings to be equally noisy.
#
# ## Gaussians, and gaps that differ
#
# Six spectra are sums of the same three lines, each with its own intensities. Some
# intensities are zero. About a third of every spectrum is missing, and the missing
# channels differ from one spectrum to the next.
#
# A gap that all data sets share is easy: leave the row out. Here hardly any row is
# complete, because a row holds one channel of all spectra. So every reading gets a
# weight of its own, one if it was made and zero if not. What stands in a gap does not
# matter; it may be NaN.

# %%
CENTRES, WIDTHS, SPECTRA = np.array([3.0, 4.2, 6.5]), np.array([0.6, 0.5, 0.8]), 6
channels = np.linspace(0, 10, 100)  # keV


def lines(theta, x):
    """The three Gaussians, (channels, 3)."""
    scaled = (x[:, None] - theta["centre"]) / jnp.exp(theta["log width"])
    return jnp.exp(-0.5 * scaled**2)


rng = np.random.default_rng(4)
intensities = rng.uniform(0.3, 1.0, (3, SPECTRA))
intensities[[0, 1, 2, 0], [1, 3, 4, 5]] = 0.0
truth = {"centre": CENTRES, "log width": np.log(WIDTHS)}
complete = np.asarray(lines(truth, channels)) @ intensities
complete = complete + 0.03 * rng.normal(size=complete.shape)
seen = np.ones(complete.shape, bool)
for s in range(SPECTRA):
    for begin in rng.choice(len(channels) - 10, 4, replace=False):
        seen[begin : begin + 10, s] = False
print(f"seen: {100 * seen.mean():.0f} % of the readings, "
      f"{100 * seen.all(axis=1).mean():.0f} % of the rows in full")  # fmt: skip

# %% [markdown]
# For comparison we fit the complete spectra, which nobody has, and spectra whose gaps
# are filled by linear interpolation, which is a common way out.

# %%
interpolated = np.empty_like(complete)
for s in range(SPECTRA):
    known = seen[:, s]
    interpolated[:, s] = np.interp(channels, channels[known], complete[known, s])

cases = {
    "complete": (channels, complete),
    "gaps left out": (channels, np.where(seen, complete, np.nan), seen),
    "gaps interpolated": (channels, interpolated),
}
spectra = vp.Problem(
    vp.Separable(lines, head=vp.dense(bias=False)), loss=vp.least_squares()
)
line_start = {"centre": jnp.array([2.5, 4.5, 7.0]), "log width": jnp.zeros(3)}
solutions, errors = {}, {}
for name, data in cases.items():
    solution = solutions[name] = vp.fit(spectra, line_start, data, epochs=100)
    assert solution.status == vp.Status.CONVERGED
    errors[name] = vp.covariance(spectra, solution, data)
    centre_errors = errors[name].theta_std["centre"]
    centres = zip(solution.theta["centre"], centre_errors, strict=True)
    print(f"{name:18}" + "  ".join(f"{c:.3f} ± {e:.3f}" for c, e in centres))
print(f"{'true':18}" + "".join(f"{centre:<15.3f}" for centre in CENTRES))

# %%
solution = solutions["gaps left out"]
w = solution.w
curves = np.asarray(lines(solution.theta, channels))
figure, axes = plt.subplots(2, 3, figsize=(8.2, 4.6), sharex=True, sharey=True)
for s, ax in enumerate(axes.flat):
    ax.fill_between(channels, 0, 1, where=~seen[:, s], color="#dddddd",
                    transform=ax.get_xaxis_transform(), linewidth=0)  # fmt: skip
    known = seen[:, s]
    ax.plot(channels[known], complete[known, s], "k.", markersize=3)
    ax.plot(channels, curves * w[:, s], color="#e69f00", linewidth=1)
    ax.plot(channels, curves @ w[:, s], color=COLOURS["GNvpro"])
    ax.set_title(f"spectrum {s + 1}", fontsize=10)
for ax in axes[1]:
    ax.set_xlabel("energy, keV")
for ax in axes[:, 0]:
    ax.set_ylabel("intensity")
plt.show()

# %% [markdown]
# The readings that interpolation makes up are taken for measured ones. The centres are
# off by several of their standard errors.
#
# In the figure, gaps are grey, the three lines yellow and their sum is blue. Where a
# line lies in the gap of one spectrum, its centre and width are known from the others.
#
# With gaps of their own, the spectra no longer share a factorisation of the design
# rows: each column of W takes one. For three columns this costs next to nothing.
#
# ## Intensities that cannot be negative
#
# The last layer is solved for without constraints, so an intensity that is zero may
# come out slightly negative. Within its error that is no contradiction. A clearly
# negative one says that the model is wrong, or that the fit is in another minimum.

# %%
w_errors = errors["gaps left out"].w_std
figure, axes = plt.subplots(1, 3, figsize=(8.2, 2.8), sharey=True)
for k, ax in enumerate(axes):
    number = np.arange(1, SPECTRA + 1)
    ax.errorbar(number, w[k], 2 * w_errors[k], fmt="o", color=COLOURS["GNvpro"],
                capsize=3, label="estimate ± 2 errors")  # fmt: skip
    ax.plot(number, intensities[k], "kx", label="true")
    ax.axhline(0, color="k", linewidth=1)
    ax.set(title=f"line {k + 1}", xlabel="spectrum")
axes[0].set_ylabel("intensity")
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# Non-negative least squares for the design rows at the final θ gives the best W ≥ 0
# *for this θ*. This is quick, and often good enough. It is not the solution of the
# constrained problem, because θ was found with W free to be negative. To see what is
# missed, we let SciPy minimise over θ and W ≥ 0 together, beginning there.

# %%
clipped = np.empty_like(w)
for s in range(SPECTRA):
    known = seen[:, s]
    clipped[:, s], _ = scipy.optimize.nnls(curves[known], complete[known, s])
free, restore = ravel_pytree((solution.theta, solution.w))
same_theta, _ = ravel_pytree((solution.theta, jnp.asarray(clipped)))


@jax.jit
def residuals(x):
    return (vp.predict(spectra, *restore(x), channels) - complete)[seen]


lower = np.r_[np.full(len(free) - clipped.size, -np.inf), np.zeros(clipped.size)]
joint = scipy.optimize.least_squares(
    residuals, same_theta, jax.jit(jax.jacfwd(residuals)), bounds=(lower, np.inf)
).x

print(f"{'':22}{'sum of squares':>15}   centres")
for name, x in (
    ("W free", free),
    ("W ≥ 0, θ as it is", same_theta),
    ("W ≥ 0, θ follows", jnp.asarray(joint)),
):
    centres = restore(x)[0]["centre"]
    print(f"{name:22}{jnp.sum(residuals(x) ** 2):15.5f}   {centres.round(4)}")

# %% [markdown]
# Here θ moves by less than its standard errors. Keep in mind what this is:
#
# - The library does not train under W ≥ 0. Non-negative least squares comes afterwards,
#   and θ does not know of it.
# - W = exp(V) would enforce the sign inside the library. V would belong to θ, and there
#   would be no linear layer left to project.
# - The standard errors above do not hold for an intensity on its bound.
#
# ## What to change
#
# - `SAMPLES = 12` to 48: the errors of the common rates are about half as large. With 3
#   they are about twice as large.
# - `RATES` to 0.3 and 0.8: rates that are closer have larger relative errors.
# - `np.where(times < 2, 0.05, 0.01)` to `np.full_like(times, 0.01)`: with uniform noise
#   the weights change nothing, and both kinds of errors agree.
# - The start `[2.5, 4.5, 7.0]` to `[1.0, 5.0, 8.0]`: the fit to the complete spectra
#   ends in another minimum, where two lines overlap and have intensities of opposite
#   sign. CONVERGED means a minimum, not the lowest one. Try several starts.
# - `np.random.default_rng(4)` to 3: now the fit with gaps ends in such a minimum.
#   Clearly negative intensities give it away. W ≥ 0 with θ following leads out of it.
#
# ## What to try next
#
# - `01_coupling`: why solving for W makes the search for θ easier.
# - `w_penalty=` of `vp.Problem` where columns of the design are nearly the same: it is
#   ridge regression for W. `vp.covariance` then takes the penalty for knowledge that
#   was there before the data.
# - `vp.solve_w(problem, theta, data)`: W(θ) for rates that are known.
# - `vp.convex_loss`: a robust loss in place of least squares where outliers are likely.
