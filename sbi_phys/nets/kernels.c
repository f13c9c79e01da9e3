/* Rational-quadratic spline (nets/spline.py) and silu layer (nets/_kernels.py) in float32, forward and gradient.

   The formulas are those of the Python files. The spline takes LANES rows at a time, with their parameters transposed so that
   one bin of all lanes is contiguous; intermediate values stay in the first-level cache. Loops over lanes have no branches, so
   that the compiler vectorises them. exp and log are polynomials (Cephes, S. Moshier; relative errors below 2e-7), which are
   vectorised on any system. Sums over many bins carry the rounding error of the previous steps (Kahan 1965), since a knot is a sum of
   up to 128 sizes and the place within a bin is divided by one of them. A NaN in the input gives a NaN in the output: compile without
   -ffast-math, which would also remove that error term. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define MAX_BINS 128
#define MANY 24 /* bins from which on sums keep their rounding error; below, they are as exact and faster without */
#define EACH for (int i = 0; i < LANES; i++)

typedef float lane[LANES];

static const float RAW_LIMIT = 30.0f;

static inline float bits_to_float(int32_t v) { float f; memcpy(&f, &v, 4); return f; }
static inline int32_t float_to_bits(float v) { int32_t i; memcpy(&i, &v, 4); return i; }
static inline float clamp(float v, float low, float high) { return v < low ? low : (v > high ? high : v); }

static inline int beyond_limit(float v) { return v < -RAW_LIMIT || v > RAW_LIMIT; }

static inline float exp_(float v) /* v in [-87, 87] or NaN */
{
    float shifted = v * 1.44269504088896341f + 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer */
    float n = shifted - 12582912.0f;
    float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t power = ((uint32_t)float_to_bits(shifted) + 127u) << 23;
    return p * bits_to_float((int32_t)power);
}

static inline float log_(float v) /* v > 0 and normal, or NaN */
{
    int32_t i = float_to_bits(v);
    int32_t e = (i - 0x3f3504f3) >> 23; /* v = 2^e m with m in [sqrt(1/2), sqrt(2)) */
    float m = bits_to_float(i - (int32_t)((uint32_t)e << 23)) - 1.0f;
    float n = (float)e, z = m * m;
    float p = 7.0376836292e-2f;
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * z - 2.12194440e-4f * n - 0.5f * z;
    return (p + m) + 0.693359375f * n + (v - v); /* the last term is 0, or NaN */
}

static inline float softplus(float v)
{
    float a = v > 0.0f ? v : -v;
    return (v > 0.0f ? v : 0.0f) + log_(1.0f + exp_(-(a > 80.0f ? 80.0f : a))) + (v - v);
}

typedef struct {
    lane stretch_w[MAX_BINS], stretch_h[MAX_BINS]; /* sizes less their minimum */
    lane inner[MAX_BINS + 1];                      /* parameters of the knots' derivatives, 0 at both ends */
    lane x0, y0, w, h, raw0, raw1, d0, d1, slope, curve, place;
    lane over_x, over_y; /* rounding error of x0 and y0, to be subtracted */
} Bin;

/* sum += term; with many bins the rounding error so far is kept in `over` */
static inline __attribute__((always_inline)) void add(int many, float term, float *sum, float *over)
{
    if (!many) {
        *sum += term;
        return;
    }
    float rest = term - *over, next = *sum + rest;
    *over = (next - *sum) - rest;
    *sum = next;
}

/* softmax times the length that the bins share */
static inline __attribute__((always_inline)) void stretches(int many, int bins, float span, lane *part)
{
    lane total, over;
    EACH total[i] = over[i] = 0.0f;
    for (int k = 0; k < bins; k++) EACH {
        part[k][i] = exp_(clamp(part[k][i], -RAW_LIMIT, RAW_LIMIT));
        add(many, part[k][i], &total[i], &over[i]);
    }
    EACH total[i] = span / total[i];
    for (int k = 0; k < bins; k++) EACH part[k][i] *= total[i];
}

static void load(int bins, int lanes, const float *p, Bin *b)
{
    int width = 3 * bins - 1;
    if (lanes < LANES) {
        memset(b->stretch_w, 0, sizeof(lane) * bins);
        memset(b->stretch_h, 0, sizeof(lane) * bins);
        memset(b->inner, 0, sizeof(lane) * (bins + 1));
    }
    EACH b->inner[0][i] = b->inner[bins][i] = 0.0f;
    for (int i = 0; i < lanes; i++) {
        const float *row = p + (long)i * width;
        for (int k = 0; k < bins; k++) b->stretch_w[k][i] = row[k];
        for (int k = 0; k < bins; k++) b->stretch_h[k][i] = row[bins + k];
        for (int k = 1; k < bins; k++) b->inner[k][i] = row[2 * bins + k - 1];
    }
}

/* the bin that holds v, searched among the knots in x, or in y for the inverse */
static inline __attribute__((always_inline)) void find(int many, int bins, float bound, float min_width, float min_derivative,
                                                       float offset, int inverse, const float *v, Bin *b)
{
    float least = 2.0f * bound * min_width, span = 2.0f * bound * (1.0f - min_width * bins);
    lane kx, ky, over_x, over_y;
    stretches(many, bins, span, b->stretch_w);
    stretches(many, bins, span, b->stretch_h);
    EACH {
        kx[i] = ky[i] = b->x0[i] = b->y0[i] = -bound;
        over_x[i] = over_y[i] = b->over_x[i] = b->over_y[i] = b->place[i] = 0.0f;
        b->w[i] = b->stretch_w[0][i]; b->h[i] = b->stretch_h[0][i];
        b->raw0[i] = b->inner[0][i]; b->raw1[i] = b->inner[1][i];
    }
    for (int k = 1; k < bins; k++) EACH {
        add(many, b->stretch_w[k - 1][i] + least, &kx[i], &over_x[i]);
        add(many, b->stretch_h[k - 1][i] + least, &ky[i], &over_y[i]);
        int beyond = v[i] >= (inverse ? ky[i] : kx[i]);
        b->x0[i] = beyond ? kx[i] : b->x0[i];
        b->y0[i] = beyond ? ky[i] : b->y0[i];
        if (many) {
            b->over_x[i] = beyond ? over_x[i] : b->over_x[i];
            b->over_y[i] = beyond ? over_y[i] : b->over_y[i];
        }
        b->place[i] = beyond ? (float)k : b->place[i];
        b->w[i] = beyond ? b->stretch_w[k][i] : b->w[i];
        b->h[i] = beyond ? b->stretch_h[k][i] : b->h[i];
        b->raw0[i] = beyond ? b->inner[k][i] : b->raw0[i];
        b->raw1[i] = beyond ? b->inner[k + 1][i] : b->raw1[i];
    }
    EACH {
        b->w[i] += least; b->h[i] += least;
        b->raw0[i] += offset; b->raw1[i] += offset;
        b->d0[i] = softplus(b->raw0[i]) + min_derivative;
        b->d1[i] = softplus(b->raw1[i]) + min_derivative;
        b->slope[i] = b->h[i] / b->w[i];
        b->curve[i] = b->d0[i] + b->d1[i] - 2.0f * b->slope[i];
    }
}

static void locate(int bins, float bound, float min_width, float min_derivative, float offset, int inverse, const float *v, Bin *b)
{
    if (bins < MANY) find(0, bins, bound, min_width, min_derivative, offset, inverse, v, b);
    else find(1, bins, bound, min_width, min_derivative, offset, inverse, v, b);
}

static inline float root(float v) /* one instruction with -fno-math-errno */
{
    return __builtin_sqrtf(v < 0.0f ? 0.0f : v);
}

void spline_map(long rows, int bins, float bound, float min_width, float min_derivative, float offset, int inverse,
                const float *x, const float *parameters, float *y, float *log_slope)
{
    Bin b;
    lane in, v, out_y, out_log;
    for (long start = 0; start < rows; start += LANES) {
        int lanes = rows - start < LANES ? (int)(rows - start) : LANES;
        load(bins, lanes, parameters + start * (3 * bins - 1), &b);
        EACH in[i] = i < lanes ? x[start + (i < lanes ? i : 0)] : 0.0f;
        EACH v[i] = clamp(in[i], -bound, bound);
        locate(bins, bound, min_width, min_derivative, offset, inverse, v, &b);
        EACH {
            float s = b.slope[i], xi;
            float dy = (v[i] - b.y0[i]) + b.over_y[i];
            float second = b.h[i] * (s - b.d0[i]) + dy * b.curve[i];
            float first = b.h[i] * b.d0[i] - dy * b.curve[i];
            float rest = -s * dy;
            float solved = clamp(2.0f * rest / (-first - root(first * first - 4.0f * second * rest)), 0.0f, 1.0f);
            xi = inverse ? solved : ((v[i] - b.x0[i]) + b.over_x[i]) / b.w[i];
            float cross = xi - xi * xi;
            float denominator = s + b.curve[i] * cross;
            float ratio = (s * xi + (b.d0[i] - s) * cross) / denominator;
            float e = b.d0[i] + (b.d1[i] - b.d0[i]) * xi - b.curve[i] * cross;
            float t = s / denominator;
            float logs = log_(t * t * e);
            float value = inverse ? b.x0[i] + (xi * b.w[i] - b.over_x[i]) : b.y0[i] + (b.h[i] * ratio - b.over_y[i]);
            int outside = v[i] != in[i];
            out_y[i] = outside ? in[i] : value;
            out_log[i] = outside ? 0.0f : (inverse ? -logs : logs);
        }
        memcpy(y + start, out_y, sizeof(float) * lanes);
        memcpy(log_slope + start, out_log, sizeof(float) * lanes);
    }
}

/* gradient of the sizes from those of the left knot and of the bin's own size; result in place of the stretches */
static void size_gradient(int bins, float span, const float *restrict place, const float *restrict left, const float *restrict size,
                          lane *restrict part)
{
    lane mean;
    EACH mean[i] = 0.0f;
    for (int k = 0; k < bins; k++) EACH {
        float g = (float)(place[i] > (float)k) * left[i] + (float)(place[i] == (float)k) * size[i];
        mean[i] += g * part[k][i];
    }
    EACH mean[i] /= span;
    for (int k = 0; k < bins; k++) EACH {
        float g = (float)(place[i] > (float)k) * left[i] + (float)(place[i] == (float)k) * size[i];
        part[k][i] *= g - mean[i];
    }
}

void spline_gradient(long rows, int bins, float bound, float min_width, float min_derivative, float offset, const float *x,
                     const float *parameters, const float *grad_y, const float *grad_log, float *grad_x, float *grad_parameters)
{
    Bin b;
    lane in, v, gy, gl, out_x, left_w, left_h, size_w, size_h, at0, at1;
    int width = 3 * bins - 1;
    float span = 2.0f * bound * (1.0f - min_width * bins);
    for (long start = 0; start < rows; start += LANES) {
        int lanes = rows - start < LANES ? (int)(rows - start) : LANES;
        load(bins, lanes, parameters + start * width, &b);
        for (int i = 0; i < LANES; i++) {
            in[i] = i < lanes ? x[start + i] : 0.0f;
            gy[i] = i < lanes ? grad_y[start + i] : 0.0f;
            gl[i] = i < lanes ? grad_log[start + i] : 0.0f;
        }
        EACH v[i] = clamp(in[i], -bound, bound);
        locate(bins, bound, min_width, min_derivative, offset, 0, v, &b);
        EACH {
            int outside = v[i] != in[i];
            float g_y = outside ? 0.0f : gy[i], g_log = outside ? 0.0f : gl[i];
            float s = b.slope[i], d0 = b.d0[i], d1 = b.d1[i], w = b.w[i], h = b.h[i];
            float xi = ((v[i] - b.x0[i]) + b.over_x[i]) / w, cross = xi - xi * xi;
            float denominator = s + b.curve[i] * cross;
            float ratio = (s * xi + (d0 - s) * cross) / denominator;
            float e = d0 + (d1 - d0) * xi - b.curve[i] * cross;
            float g_rise = g_y * h;
            float g_n = g_rise / denominator;
            float minus_g_d = (2.0f * g_log + g_rise * ratio) / denominator;
            float g_e = g_log / e;
            float through_curve = cross * (minus_g_d + g_e);
            float g_cross = g_n * (d0 - s) - b.curve[i] * (minus_g_d + g_e);
            float g_xi = g_cross - 2.0f * xi * g_cross + g_n * s + g_e * (d1 - d0);
            float g_s = 2.0f * g_log / s - minus_g_d + g_n * (xi - cross) + 2.0f * through_curve;
            float g_x = g_xi / w, per_w = g_s / w;
            float minus0 = exp_(-clamp(b.raw0[i], -80.0f, 80.0f)), minus1 = exp_(-clamp(b.raw1[i], -80.0f, 80.0f));
            at0[i] = (g_e + g_n * cross - g_e * xi - through_curve) / (1.0f + minus0);
            at1[i] = (g_e * xi - through_curve) / (1.0f + minus1);
            left_w[i] = -g_x; size_w[i] = -(per_w * s + g_x * xi);
            left_h[i] = g_y; size_h[i] = per_w + g_y * ratio;
            out_x[i] = outside ? gy[i] : g_x;
        }
        memcpy(grad_x + start, out_x, sizeof(float) * lanes);
        size_gradient(bins, span, b.place, left_w, size_w, b.stretch_w);
        size_gradient(bins, span, b.place, left_h, size_h, b.stretch_h);
        for (int k = 1; k < bins; k++) EACH
            b.inner[k][i] = (b.place[i] == (float)k ? at0[i] : 0.0f) + (b.place[i] == (float)(k - 1) ? at1[i] : 0.0f);
        for (int i = 0; i < lanes; i++) {
            float *row = grad_parameters + (start + i) * width;
            const float *raw = parameters + (start + i) * width; /* beyond the limit the map is constant */
            for (int k = 0; k < bins; k++) row[k] = beyond_limit(raw[k]) ? 0.0f : b.stretch_w[k][i];
            for (int k = 0; k < bins; k++) row[bins + k] = beyond_limit(raw[bins + k]) ? 0.0f : b.stretch_h[k][i];
            for (int k = 1; k < bins; k++) row[2 * bins + k - 1] = b.inner[k][i];
        }
    }
}

/* z <- z + shift, out = base + silu(z); shift has one row for all (stride 0) or one for each, base may be absent */
void silu_map(long rows, int columns, float *restrict z, const float *restrict shift, long shift_stride, const float *restrict base,
              float *restrict out)
{
    for (long r = 0; r < rows; r++) {
        float *restrict zr = z + r * columns, *restrict o = out + r * columns;
        const float *restrict s = shift + r * shift_stride;
        for (int c = 0; c < columns; c++) {
            zr[c] += s[c];
            o[c] = zr[c] / (1.0f + exp_(clamp(-zr[c], -87.0f, 87.0f)));
        }
        if (base)
            for (int c = 0; c < columns; c++) o[c] += base[r * columns + c];
    }
}

void silu_gradient(long n, const float *restrict z, const float *restrict grad, float *restrict out)
{
    for (long i = 0; i < n; i++) {
        float sigmoid = 1.0f / (1.0f + exp_(clamp(-z[i], -87.0f, 87.0f)));
        out[i] = grad[i] * sigmoid * (1.0f + z[i] * (1.0f - sigmoid));
    }
}
