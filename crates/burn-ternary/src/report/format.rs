//! Numbers as people read them.

/// `value` with `digits` significant digits, in scientific notation outside [1e-3, 1e6).
pub(super) fn significant(value: f64, digits: usize) -> String {
    // The exponent is that of the rounded number: 0.9996 in three digits is 1.00.
    let scientific = format!("{value:.*e}", digits - 1);
    let exponent = scientific.split_once('e').and_then(|(_, text)| text.parse().ok());
    match exponent {
        Some(exponent @ -3..6) => {
            let decimals = (digits as i32 - 1 - exponent).max(0) as usize;
            format!("{value:.decimals$}")
        }
        _ => scientific,
    }
}

/// A count in three digits: `950`, `1.23k`, `12.3k`, `1.43M`, `7.00G`.
pub(super) fn compact(value: f64) -> String {
    let (scale, unit) = match value.abs() {
        size if size >= 999.5e6 => (1e9, "G"),
        size if size >= 999.5e3 => (1e6, "M"),
        size if size >= 999.5 => (1e3, "k"),
        _ => return format!("{value:.0}"),
    };
    significant(value / scale, 3) + unit
}

/// Seconds as `45s`, `1m12s`, `2h05m` or `3d04h`; `?` for what is no time.
pub(super) fn duration(seconds: f64) -> String {
    if !(0.0..1e12).contains(&seconds) {
        return "?".into();
    }
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_times_are_short() {
        let counts = [0.4, 999.4, 999.6, 12_345.0, 999_700.0, 7e9, f64::NAN].map(compact);
        assert_eq!(counts, ["0", "999", "1.00k", "12.3k", "1.00M", "7.00G", "NaN"]);
        let times = [0.2, 59.4, 59.6, 3599.6, 7500.0, 273_600.0, -1.0, f64::NAN, f64::INFINITY];
        let texts = ["0s", "59s", "1m00s", "1h00m", "2h05m", "3d04h", "?", "?", "?"];
        assert_eq!(times.map(duration), texts);
    }

    #[test]
    fn numbers_have_the_given_digits() {
        for (value, text) in [
            (0.0, "0.000"),
            (3.21449, "3.214"),
            (-24.9, "-24.90"),
            (0.99996, "1.000"),
            (999_999.6, "1.000e6"),
            (123456.0, "123456"),
            (1.5e6, "1.500e6"),
            (0.00123456, "0.001235"),
            (1.9e-5, "1.900e-5"),
            (f64::NAN, "NaN"),
            (f64::INFINITY, "inf"),
        ] {
            assert_eq!(significant(value, 4), text);
        }
    }
}
