// The time loop for one shot on one CPU thread; cpu.py compiles and calls it for engine.py.
//
// All time steps of a shot run before the next shot starts, so that its fields stay in the core's cache.
// Fields are (nz + 1, stride), at least 16 cells wider than the grid's nx. Row 0 is spare, so that every row has
// two cells left of its column 0: the last two of the row before. Those, and the two right of column nx - 1,
// repeat the grid's other side. Windows may reach beyond nx to end on a whole vector, never into the last 16.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

enum Mode { PLAIN, STORE, ADJOINT, TANGENT };  // the same numbers as in passes.py

struct Grid {
    long nz, nx, stride;         // cells, sponge included
    long pad;                    // width of the sponge
    long source_row, source;     // cell of the injection
    long receiver_row;           // recorded from column pad to nx - pad - 1
    long block;                  // time steps for which one window holds
    const int *windows;          // (blocks, nz, 2): first and last + 1 column to update of every row
};

template <typename T>
struct Shot {
    T *p, *p_old;                // the fields at this time step and one before; STORE does not use them
    T *history;                  // p from sample begin - 2 on: STORE extends it, ADJOINT and TANGENT read it
    const T *alpha;              // (v dt/dx)^2
    const T *kappa_z, *kappa_x;  // damping x dt of the sponge's rows (nz) and columns (stride)
    T *image;                    // ADJOINT: += field x (alpha lap p). TANGENT: relative change of alpha
    T *drive;                    // (n_samples) added at the source. ADJOINT: becomes the gradient towards it
    T *gather;                   // (n_samples, nx - 2 pad) recorded. ADJOINT: added at the receivers
    T *sponge;                   // ADJOINT: -= kappa x gradient towards kappa. TANGENT: relative change of kappa
};

// The Laplacian at *c, given the offsets of the cells above and below. It adds differences to the centre, which
// rounds off less than subtracting five times the centre.
template <typename T>
static inline T laplacian(const T *c, long up2, long up, long down, long down2) {
    const T m = *c;
    return T(4.0 / 3) * (((c[up] - m) + (c[down] - m)) + ((c[-1] - m) + (c[1] - m))) -
           T(1.0 / 12) * (((c[up2] - m) + (c[down2] - m)) + ((c[-2] - m) + (c[2] - m)));
}

// Write the field at sample n into next, given p at n - 1 and p_old at n - 2. past: the history at n - 2, n - 1, n.
template <typename T, int MODE>
static void step(const Grid &g, const Shot<T> &s, const int *window, const T *inside, T *sums, const T *p,
                 const T *p_old, T *next, const T *past) {
    const T change = MODE == TANGENT ? *s.sponge : T(0);
    const long field = (g.nz + 1) * g.stride;
    for (long z = 0; z < g.nz; z++) {
        const long lo = window[2 * z], hi = window[2 * z + 1];
        if (MODE == STORE) {  // the next step reads beyond the window, where a reused slot still holds another time
            const bool at_edge = lo < hi && (lo < 2 || hi > g.nx - 2);
            long left = at_edge ? 0 : lo < hi ? lo - 2 : g.stride, right = at_edge ? g.stride : hi + 2;
            for (long n = g.nz - 2; n <= g.nz + 2; n++) {
                const int *other = window + 2 * ((z + n) % g.nz);
                if (other[0] < other[1] && other[0] < left) left = other[0];
                if (other[0] < other[1] && other[1] > right) right = other[1];
            }
            T *out = next + (z + 1) * g.stride;
            for (long x = left; x < lo; x++) out[x] = 0;
            for (long x = hi > left ? hi : left; x < right; x++) out[x] = 0;
        }
        if (lo >= hi) continue;
        auto rows = [&](long n) { return (z + n < 0 ? n + g.nz : z + n >= g.nz ? n - g.nz : n) * g.stride; };
        const long up2 = rows(-2), up = rows(-1), down = rows(1), down2 = rows(2), here = (z + 1) * g.stride;
        const T *c = p + here, *old = p_old + here, *a = s.alpha + here;
        const T *h2 = past + here, *h1 = h2 + field, *h0 = h1 + field;
        T *out = next + here, *image = s.image + here;
        const T kappa_z = s.kappa_z[z];
#pragma omp simd
        for (long x = lo; x < hi; x++) {
            const T m = c[x], kappa = s.kappa_x[x] + kappa_z * inside[x];  // corners have the columns' damping
            T result = m + ((1 - kappa) * (m - old[x]) + a[x] * laplacian(c + x, up2, up, down, down2));
            if (MODE == ADJOINT || MODE == TANGENT) {
                const T diff = h1[x] - h2[x], alpha_lap = h0[x] - h1[x] - (1 - kappa) * diff;
                if (MODE == ADJOINT) image[x] += m * alpha_lap, sums[x] += m * diff * kappa / a[x];
                if (MODE == TANGENT) result += image[x] * alpha_lap - change * kappa * diff;
            }
            out[x] = result;
        }
        if (lo < 2 || hi > g.nx - 2)
            for (long x = 0; x < 2; x++) out[g.nx + x] = out[x], out[x - 2] = out[g.nx - 2 + x];
    }
}

// Take samples begin ... end - 1, backwards in ADJOINT.
template <typename T, int MODE>
static void run(const Grid &g, Shot<T> s, long begin, long end) {
    const long source = (g.source_row + 1) * g.stride + g.source, n_columns = g.nx - 2 * g.pad;
    const long receivers = (g.receiver_row + 1) * g.stride + g.pad, field = (g.nz + 1) * g.stride;
    T *inside = new T[2 * g.stride](), *sums = inside + g.stride;  // sums: by column, over rows and time
    for (long x = g.pad; x < g.nx - g.pad; x++) inside[x] = 1;
    for (long i = begin; i < end; i++) {
        const long n = MODE == ADJOINT ? begin + end - 1 - i : i;
        const int *window = g.windows + n / g.block * g.nz * 2;
        T *gather = s.gather + n * n_columns, *past = s.history + (n - begin) * field;
        if (MODE == STORE) {
            step<T, MODE>(g, s, window, inside, sums, past + field, past, past + 2 * field, past);
            past[2 * field + source] += s.drive[n];
            continue;
        }
        if (MODE == ADJOINT) {
            for (long x = 0; x < n_columns; x++) s.p[receivers + x] += s.alpha[receivers + x] * gather[x];
            s.drive[n] = s.p[source] / s.alpha[source];
        }
        step<T, MODE>(g, s, window, inside, sums, s.p, s.p_old, s.p_old, past);
        T *next = s.p_old;
        s.p_old = s.p;
        s.p = next;
        if (MODE == ADJOINT) continue;
        s.p[source] += s.drive[n];
        for (long x = 0; x < n_columns; x++) gather[x] = s.p[receivers + x];
    }
    if (MODE == ADJOINT)
        for (long x = 0; x < g.nx; x++) *s.sponge -= sums[x];
    delete[] inside;
}

template <typename T>
static void dispatch(int mode, const Grid *g, const Shot<T> *s, long begin, long end) {
#if defined(__SSE2__)  // fading fields become denormal numbers, which are slow: flush them to zero in here
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
#endif
    if (mode == PLAIN) run<T, PLAIN>(*g, *s, begin, end);
    if (mode == STORE) run<T, STORE>(*g, *s, begin, end);
    if (mode == ADJOINT) run<T, ADJOINT>(*g, *s, begin, end);
    if (mode == TANGENT) run<T, TANGENT>(*g, *s, begin, end);
#if defined(__SSE2__)
    _mm_setcsr(before);
#endif
}

extern "C" void wave_float32(int mode, const Grid *g, const Shot<float> *s, long begin, long end) {
    dispatch(mode, g, s, begin, end);
}
extern "C" void wave_float64(int mode, const Grid *g, const Shot<double> *s, long begin, long end) {
    dispatch(mode, g, s, begin, end);
}
