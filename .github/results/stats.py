"""Statistics of the study: spread over seeds, intervals, verdicts, models of a grid, p values."""
import functools
import math

import numpy as np

MARGIN = 1.1  # points; the headline effect of the paper is 1.13 (QUESTIONS.md)


# ------------------------------------------ Student's t ------------------------------------------
def central_probability(t, freedom):
    """P(|T| < t) for Student's t: with T = √freedom tan θ the density of θ is cosⁿ θ,
    n = freedom − 1, integrated by the midpoint rule."""
    def integral(angle):
        middles = (np.arange(10_000) + 0.5) / 10_000
        return angle * np.mean(np.cos(angle * middles) ** (freedom - 1))
    return integral(math.atan2(abs(t), math.sqrt(freedom))) / integral(math.pi / 2)


def p_value(t, freedom):
    """Two-sided."""
    return 1 - central_probability(t, freedom)


@functools.cache
def t_quantile(freedom, confidence=0.95):
    """The t that |T| exceeds with probability 1 − confidence, by bisection."""
    low = 0.0
    high = 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if central_probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


# ------------------------------------------ differences ------------------------------------------
def pooled_sd(groups):
    """Standard deviation of one run within groups of runs that differ in the seed alone, and its
    degrees of freedom. Groups of one run say nothing about it."""
    squares = sum(((np.array(group) - np.mean(group)) ** 2).sum() for group in groups)
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return math.nan, 0
    return math.sqrt(squares / freedom), freedom


def half_width(sd, freedom, *sizes):
    """Half of the 95 % interval of a mean of n runs, or of the difference of two such means."""
    if not freedom:
        return math.nan
    return t_quantile(freedom) * sd * math.sqrt(sum(1 / n for n in sizes))


def welch_half_width(*parts):
    """Half of the 95 % interval of a sum of independent means: (variance, its degrees of freedom)
    of each; the degrees of freedom of the sum are those of Welch and Satterthwaite."""
    variance = sum(part for part, _ in parts)
    freedom = variance ** 2 / sum(part ** 2 / freedom for part, freedom in parts)
    return t_quantile(freedom) * math.sqrt(variance)


def verdict(difference, half):
    """better, worse, level or open, by the rule of QUESTIONS.md."""
    if difference - half > 0:
        return "better"
    if difference + half < 0:
        return "worse"
    if abs(difference) + half < MARGIN:
        return "level"
    return "open"


# ------------------------------------------ models of a grid -------------------------------------
def fit(columns, y):
    """R² of least squares with a constant; leave-one-out R², in which both the model and the mean
    know the other cells only."""
    n = len(y)
    x = np.column_stack([np.ones(n), *columns])
    hat = x @ np.linalg.pinv(x)
    residual = y - hat @ y
    left_out = residual / (1 - hat.diagonal()) * (1 - 1 / n)
    total = ((y - y.mean()) ** 2).sum()
    return 1 - (residual ** 2).sum() / total, 1 - (left_out ** 2).sum() / total


def models(a, b):
    """The columns of each model, for a = log α and b = log λ."""
    p = a + b
    return {"log α, quadratic (3)": [a, a ** 2],
            "log αλ, quadratic (3)": [p, p ** 2],
            "log α + log λ, both quadratic (5)": [a, a ** 2, b, b ** 2]}


def best_exponent(a, b, y):
    """The w for which a quadratic in log αλʷ explains most, and that quadratic."""
    fits = {}
    for w in np.arange(0.3, 1.31, 0.01):
        quadratic, residual, *_ = np.polyfit(a + w * b, y, 2, full=True)
        fits[residual[0]] = w, quadratic
    return fits[min(fits)]


def exponent_scores(a, b, y):
    """w, R² and leave-one-out R²; each left-out cell is unknown to its w as well."""
    n = len(y)
    errors = []
    for i in range(n):
        others = np.arange(n) != i
        w, quadratic = best_exponent(a[others], b[others], y[others])
        errors.append((y[i] - np.polyval(quadratic, a[i] + w * b[i])) * (1 - 1 / n))
    w = best_exponent(a, b, y)[0]
    left_out = 1 - np.square(errors).sum() / ((y - y.mean()) ** 2).sum()
    return w, fit([a + w * b, (a + w * b) ** 2], y)[0], left_out


def p_of_alpha(a, b, y):
    """p of a term log α beside the quadratic in log αλ."""
    p = a + b
    freedom = len(y) - 4
    without = fit([p, p ** 2], y)[0]
    with_alpha = fit([p, p ** 2, a], y)[0]
    return p_value(math.sqrt((with_alpha - without) * freedom / (1 - with_alpha)), freedom)


def correlation(x, y):
    """Pearson's r and its p."""
    r = np.corrcoef(x, y)[0, 1]
    freedom = len(x) - 2
    return r, p_value(r * math.sqrt(freedom / (1 - r * r)), freedom)


# ------------------------------------------ NT-Xent's minimum --------------------------------
def best_positive_similarity(m, alpha, lam):
    """P*, the mean positive similarity at which NT-Xent's lower bound over m images is lowest:
    where its derivative vanishes, e^{α(P + (1 + P)/K)} = (K + λ)/(λ − 1), and 1 if nowhere."""
    k = 2 * (m - 1)
    if lam <= 1:
        return 1.0
    return min(1.0, (k / alpha * math.log((k + lam) / (lam - 1)) - 1) / (k + 1))


def ntxent_floor(m, alpha, lam):
    """A lower bound of generalized NT-Xent over m images: by Jensen the negatives weigh at least
    as much as K times their mean similarity, and that is at least −(1 + P)/K."""
    k = 2 * (m - 1)
    p = best_positive_similarity(m, alpha, lam)
    negatives = math.log(k) - alpha * (1 + p) / k
    return -p + lam / alpha * np.logaddexp(alpha * p, negatives)
