"""Rectified flow between Gaussian noise and CLIP features (BLIP3-o, section 3.2), for any velocity network.

    x_t = t x1 + (1 - t) x0        x0 ~ N(0, I) is noise at t = 0, x1 is data at t = 1
    v   = dx_t/dt = x1 - x0        what the network learns: loss = mean |velocity(x_t, t, cond) - v|^2
    x_{t+dt} = x_t + dt * velocity(x_t, t, cond)                    sampling: Euler steps from t = 0 to t = 1

Code bases differ in the direction of time and the sign of the velocity, and mixing them up doesn't show in
the loss, only in the images:

                                  noise is at    data is at    the network predicts         in our t and v
    here, and the paper           t = 0          t = 1         v = x1 - x0  (data - noise)   t, v
    official BLIP3-o code         time 1000      time 0        noise - data                  1000 (1 - t), -v
    SD3, FLUX                     t = 1          t = 0         noise - data                  1 - t, -v
    SiT and Lumina-Next code      t = 0          t = 1         data - noise                  t, v

Everything here is in the first row. dit.py alone translates to the second, so that official weights fit.
Shapes: B batch, `...` any further dimensions (here C x H x W), t is (B,) in fp32.
"""
import torch

SAMPLERS = ("euler", "ab2")  # of `euler_sample`


def shift_time(t, shift):
    """t' = t / (t + shift (1 - t)): moves times toward noise for shift > 1; shift 1 / shift is the inverse.

    shift = 1 is the identity: the paper, and what official weights need. Why shift at all: the features of
    one image are highly redundant, so x_t at t = 0.05 already gives the image away, and the prompt only
    matters for t < 0.05: 5 % of uniform training times, and 2 of 30 sampling steps. A small model trained
    with uniform t is therefore slow to use its prompt. SD3 (section 5.3.2) derives the formula for larger
    images (sigma = 1 - t), RAE (arXiv 2510.11690) uses it for features like ours. Train and sample with the
    same shift.
    """
    if shift <= 0:
        raise ValueError(f"shift must be positive, not {shift}")
    return t / (t + shift * (1 - t))


def random_tensor(sampler, shape, generator=None, device=None):
    """sampler(shape), torch.rand or torch.randn, on `device`; drawn where the generator is, so that a CPU
    generator gives the same numbers on any device."""
    source = device if generator is None else generator.device
    return sampler(shape, generator=generator, device=source).to(device)


def sample_t(n, shift=1.0, generator=None, device=None):
    """n training times in [0, 1), (n,) fp32: uniform, then shifted."""
    return shift_time(random_tensor(torch.rand, (n,), generator, device), shift)


def interpolate(x0, x1, t):
    """The point x_t = t x1 + (1 - t) x0 on the straight path; x0 and x1 (B, ...), t (B,)."""
    t = t.view(-1, *[1] * (x1.ndim - 1))  # (B, 1, ...)
    return t * x1 + (1 - t) * x0


def random_drop(n, p, generator=None, device=None):
    """Dropout mask of n conditions: (n,) bool, each True, that is dropped, with probability p."""
    if not 0 <= p <= 1:
        raise ValueError(f"the probability of dropping a condition must be in [0, 1], not {p}")
    return random_tensor(torch.rand, (n,), generator, device) < p


def drop_condition(cond, dropped):
    """Zero the whole condition of the samples where `dropped` (B,) bool is True; cond (B, ...).

    This trains the unconditional flow with the same network (Ho & Salimans, arXiv 2207.12598); `guide` uses
    the same zeros as its null condition.
    """
    kept = ~dropped.to(cond.device, non_blocking=True)
    return cond * kept.view(-1, *[1] * (cond.ndim - 1))


def flow_matching_loss(velocity, x1, cond, shift=1.0, drop=0.1, dropped=None, x0=None, t=None,
                       generator=None):
    """The training loss of each sample, (B,) fp32: the velocity's mean squared error over all dims of x1.

    velocity(x_t, t, cond) -> like x1; x1 (B, ...) data; cond (B, ...), or None with drop=0. Times t (B,),
    noise x0 like x1 and the mask `dropped` (B,) bool, True with probability `drop`, are drawn unless given.
    Per sample, so that logs can bin the loss by t.
    """
    if t is None:
        t = sample_t(len(x1), shift, generator, x1.device)
    if x0 is None:
        x0 = random_tensor(torch.randn, x1.shape, generator, x1.device)
    if dropped is None and drop != 0:
        dropped = random_drop(len(x1), drop, generator, x1.device)
    if dropped is not None:
        cond = drop_condition(cond, dropped)
    dtype, x0, x1 = x1.dtype, x0.float(), x1.float()  # half precision would round t and the target
    predicted = velocity(interpolate(x0, x1, t).to(dtype), t, cond)
    return (predicted.float() - (x1 - x0)).square().flatten(1).mean(1)


def timesteps(steps, shift=1.0, device=None):
    """The times of `euler_sample` from 0 to 1, (steps + 1,) fp32: uniform, then shifted."""
    if steps < 1:
        raise ValueError(f"sampling needs at least one step, not {steps}")
    return shift_time(torch.arange(steps + 1, dtype=torch.float32, device=device) / steps, shift)


def guided(v_cond, v_null, scale):
    """Classifier-free guidance: scale 0 is the unconditional velocity, 1 the conditional, > 1 beyond."""
    return v_null + scale * (v_cond - v_null)


def guide(velocity, cond, null=None, scale=1.0, prepare=lambda cond: cond, interval=(0, 1)):
    """Bind the condition and apply guidance: velocity(x, t, cond) -> velocity(x, t) for `euler_sample`.

    cond (B, ...); null, of the same shape or broadcast to it, defaults to zeros as in `drop_condition`.
    Scale 1 runs only cond and scale 0 only null; any other scale runs both as one batch of 2B, [null, cond],
    the order of the official code. There is guidance at the times `interval` alone, both ends included, and
    elsewhere only cond runs (Kynkaanniemi et al., arXiv 2404.07724). `prepare(a batch of conditions)` runs
    once for each; velocity receives its result at every step. Use it to precompute what doesn't depend on x
    and t (NextDiT.cache_condition). Raises ValueError unless 0 <= low <= high <= 1.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance takes an interval of times, 0 <= low <= high <= 1, not {low} to {high}")
    null = torch.zeros_like(cond) if null is None else null.expand_as(cond)
    always, pair = (low, high) == (0, 1), scale not in (0, 1)
    both = prepare(torch.cat([null, cond])) if pair else None
    one = prepare(null if scale == 0 else cond) if not (pair and always) else None

    def guided_velocity(x, t):
        if not pair or not (always or low <= float(t[0]) <= high):
            return velocity(x, t, one)
        v_null, v_cond = velocity(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        return guided(v_cond, v_null, scale)
    return guided_velocity


@torch.no_grad()
def euler_sample(velocity, x0, steps, shift=1.0, trajectory=None, sampler="euler"):
    """Integrate dx/dt = velocity(x, t) from noise x0 (B, ...) at t = 0 to data at t = 1 in Euler steps.

    velocity gets x in x0's dtype and t (B,) in fp32; the state is kept in fp32, so that small steps aren't
    rounded away. Returns x1 in x0's dtype. A list given as `trajectory` receives all steps + 1 states, from
    noise to result. sampler "ab2": Adams-Bashforth of order 2, which extends the line through the last
    velocity and this one, without further evaluations. Its first step is an Euler step, as there is no
    earlier velocity, and so is its last: at shift > 1 that is by far the longest, and the line would
    overshoot. Raises ValueError for a sampler that isn't one of SAMPLERS.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"there is no sampler {sampler!r}: use {' or '.join(SAMPLERS)}")
    times = timesteps(steps, shift, x0.device)  # (steps + 1,)
    x, last = x0.float(), None
    for i in range(steps):
        if trajectory is not None:
            trajectory.append(x.to(x0.dtype))
        v = velocity(x.to(x0.dtype), times[i].expand(len(x))).float()
        dt, slope = times[i + 1] - times[i], v
        if sampler == "ab2" and 0 < i < steps - 1:
            slope = v + dt / (times[i] - times[i - 1]) / 2 * (v - last)
        x = x + dt * slope
        last = v
    if trajectory is not None:
        trajectory.append(x.to(x0.dtype))
    return x.to(x0.dtype)
