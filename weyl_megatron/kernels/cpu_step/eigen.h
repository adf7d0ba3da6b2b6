// Eigenvalues and vectors of small symmetric matrices: Jacobi's rotations where there are few rows,
// tridiagonal form and QL steps where there are more.

#pragma once

#include <cmath>

#include "tables.h"

namespace {

// The eigenvalues and vectors of a symmetric matrix of b rows, by Jacobi's rotations; a is
// destroyed, v gets them as columns.
void by_rotations(int b, double *a, double *v) {
    for (int i = 0; i < b; i++)
        for (int j = 0; j < b; j++) v[i * b + j] = i == j;
    for (int sweep = 0; sweep < 30; sweep++) {
        double off = 0, on = 0;
        for (int i = 0; i < b; i++)
            for (int j = 0; j < b; j++) (i == j ? on : off) += a[i * b + j] * a[i * b + j];
        if (off <= 1e-32 * on) return;
        for (int p = 0; p < b; p++)
            for (int q = p + 1; q < b; q++) {
                if (a[p * b + q] == 0) continue;
                const double theta = (a[q * b + q] - a[p * b + p]) / (2 * a[p * b + q]);
                const double t =
                    (theta >= 0 ? 1 : -1) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
                const double c = 1 / std::sqrt(t * t + 1), s = t * c;
                for (int k = 0; k < b; k++) {
                    const double x = a[k * b + p], y = a[k * b + q];
                    a[k * b + p] = c * x - s * y, a[k * b + q] = s * x + c * y;
                }
                for (int k = 0; k < b; k++) {
                    const double x = a[p * b + k], y = a[q * b + k];
                    a[p * b + k] = c * x - s * y, a[q * b + k] = s * x + c * y;
                }
                for (int k = 0; k < b; k++) {
                    const double x = v[k * b + p], y = v[k * b + q];
                    v[k * b + p] = c * x - s * y, v[k * b + q] = s * x + c * y;
                }
            }
    }
}

// a becomes tridiagonal by Householder's reflections, whose product is left in v: diagonal d, and e
// below it from 1 on (EISPACK: tred2).
void tridiagonal(int n, const double *a, double *v, double *d, double *e) {
    for (int i = 0; i < n * n; i++) v[i] = a[i];
    for (int i = n - 1; i > 0; i--) {
        double *row = v + i * n, scale = 0, h = 0;
        for (int k = 0; k < i; k++) scale += std::fabs(row[k]);
        if (i == 1 || scale == 0) {
            e[i] = row[i - 1];
            d[i] = 0;
            continue;
        }
        for (int k = 0; k < i; k++) {
            row[k] /= scale;
            h += row[k] * row[k];
        }
        const double f = row[i - 1], g = f >= 0 ? -std::sqrt(h) : std::sqrt(h);
        e[i] = scale * g;
        h -= f * g;
        row[i - 1] = f - g;
        for (int j = 0; j < i; j++) e[j] = 0;
        for (int j = 0; j < i; j++) {  // e = A u, of which the lower half is there
            double total = v[j * n + j] * row[j];
            for (int k = 0; k < j; k++) {
                total += v[j * n + k] * row[k];
                e[k] += v[j * n + k] * row[j];
            }
            e[j] += total;
        }
        double inner = 0;
        for (int j = 0; j < i; j++) {
            v[j * n + i] = row[j] / h;
            e[j] /= h;
            inner += e[j] * row[j];
        }
        const double half = inner / (h + h);
        for (int j = 0; j < i; j++) e[j] -= half * row[j];
        for (int j = 0; j < i; j++)
            for (int k = 0; k <= j; k++) v[j * n + k] -= row[j] * e[k] + e[j] * row[k];
        d[i] = h;
    }
    d[0] = e[0] = 0;
    for (int i = 0; i < n; i++) {  // the product of the reflections
        if (d[i] != 0) {
            double sums[MOST] = {};
            for (int k = 0; k < i; k++)
                for (int j = 0; j < i; j++) sums[j] += v[i * n + k] * v[k * n + j];
            for (int k = 0; k < i; k++)
                for (int j = 0; j < i; j++) v[k * n + j] -= sums[j] * v[k * n + i];
        }
        d[i] = v[i * n + i];
        v[i * n + i] = 1;
        for (int j = 0; j < i; j++) v[j * n + i] = v[i * n + j] = 0;
    }
}

// The eigenvalues of a tridiagonal matrix, in d; v is turned with it (EISPACK: tql2).
void by_ql(int n, double *v, double *d, double *e) {
    for (int i = 1; i < n; i++) e[i - 1] = e[i];
    e[n - 1] = 0;
    for (int l = 0; l < n; l++)
        for (int tries = 0; tries < 60; tries++) {
            int m = l;
            for (; m < n - 1; m++)
                if (std::fabs(e[m]) <= 1e-16 * (std::fabs(d[m]) + std::fabs(d[m + 1]))) break;
            if (m == l) break;
            double g = (d[l + 1] - d[l]) / (2 * e[l]), r = std::hypot(g, 1.0);
            g = d[m] - d[l] + e[l] / (g + (g >= 0 ? r : -r));
            double s = 1, c = 1, p = 0;
            int i = m - 1;
            for (; i >= l; i--) {
                double f = s * e[i];
                const double b = c * e[i];
                r = std::hypot(f, g);
                e[i + 1] = r;
                if (r == 0) {
                    d[i + 1] -= p;
                    e[m] = 0;
                    break;
                }
                s = f / r, c = g / r;
                g = d[i + 1] - p;
                r = (d[i] - g) * s + 2 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                for (int k = 0; k < n; k++) {
                    f = v[k * n + i + 1];
                    v[k * n + i + 1] = s * v[k * n + i] + c * f;
                    v[k * n + i] = c * v[k * n + i] - s * f;
                }
            }
            if (r == 0 && i >= l) continue;
            d[l] -= p;
            e[l] = g;
            e[m] = 0;
        }
}

// The eigenvalues, on the diagonal of a, and vectors of a symmetric matrix of b rows; a is
// destroyed, v gets them as columns.
void eigen(int b, double *a, double *v) {
    if (b <= FEW) return by_rotations(b, a, v);
    double d[MOST], e[MOST];
    tridiagonal(b, a, v, d, e);
    by_ql(b, v, d, e);
    for (int i = 0; i < b; i++) a[i * b + i] = d[i];
}

}  // namespace
