//! The figures as a picture: one bar a side, on a logarithmic scale, from its median to its 99th percentile.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::report::SIDES;
use crate::stats::Figures;

const LABEL: f64 = 330.0;
const WIDTH: f64 = 640.0;
const ROW: f64 = 20.0;
const TOP: f64 = 44.0;

/// Position of a time on the scale.
struct Scale {
    low: f64,
    decades: f64,
}

impl Scale {
    /// From the decade of the fastest to that of the slowest.
    fn of(figures: &BTreeMap<String, Figures>) -> Option<Self> {
        let all = figures.values();
        let fastest = all.clone().map(|figures| figures.p50_us).reduce(f64::min)?;
        let slowest = all.map(|figures| figures.p99_us).reduce(f64::max)?;
        let low = fastest.max(1e-3).log10().floor();
        let decades = (slowest.max(1e-3).log10().ceil() - low).max(1.0);
        Some(Self { low, decades })
    }

    fn x(&self, micros: f64) -> f64 {
        LABEL + (micros.max(1e-3).log10() - self.low) / self.decades * WIDTH
    }

    /// The decades with their words.
    fn ticks(&self) -> Vec<(f64, String)> {
        let mut ticks = Vec::new();
        let mut power = self.low;
        while power <= self.low + self.decades {
            let micros = 10f64.powf(power);
            let words = match micros {
                ..1e3 => format!("{micros} µs"),
                1e3..1e6 => format!("{} ms", micros / 1e3),
                _ => format!("{} s", micros / 1e6),
            };
            ticks.push((self.x(micros), words));
            power += 1.0;
        }
        ticks
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// An SVG document; sides that were not measured are left out.
pub fn draw(title: &str, figures: &BTreeMap<String, Figures>) -> String {
    let rows: Vec<_> = SIDES
        .iter()
        .filter_map(|(side, words)| Some((*words, figures.get(*side)?)))
        .collect();
    let count = u32::try_from(rows.len()).unwrap_or(u32::MAX);
    let (width, height) = (LABEL + WIDTH + 90.0, TOP + f64::from(count) * ROW + 24.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"18\" font-size=\"14\">{}</text>\n\
         <text x=\"8\" y=\"34\" fill=\"#666\">dark to the median, middle to p90, light to p99; logarithmic</text>\n",
        escape(title)
    );
    let Some(scale) = Scale::of(figures) else {
        return out + "</svg>\n";
    };
    // Writing into a string cannot fail.
    for (x, words) in scale.ticks() {
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{:.1}\" stroke=\"#ddd\"/>",
            height - 20.0
        );
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#666\">{words}</text>",
            height - 6.0
        );
    }
    let mut y = TOP;
    for (words, figures) in rows {
        let _ = writeln!(
            out,
            "<text x=\"8\" y=\"{:.1}\">{}</text>",
            y + 14.0,
            escape(words.trim_start())
        );
        let bars = [
            (figures.p99_us, "#c6dbef"),
            (figures.p90_us, "#6baed6"),
            (figures.p50_us, "#08519c"),
        ];
        for (micros, colour) in bars {
            let length = (scale.x(micros) - LABEL).max(1.0);
            let _ = writeln!(
                out,
                "<rect x=\"{LABEL}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                y + 3.0,
                ROW - 6.0
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#333\">{:.2} ms</text>",
            scale.x(figures.p99_us) + 4.0,
            y + 14.0,
            figures.p50_us / 1e3
        );
        y += ROW;
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn bars_are_as_long_as_the_scale_says_and_text_is_escaped() {
        let figures = |millis| Figures::of(&[Duration::from_millis(millis)]).unwrap();
        let sides = BTreeMap::from([
            ("claim_answer".to_owned(), figures(1)),
            ("firecracker_spawn_answer".to_owned(), figures(100)),
        ]);
        let svg = draw("a < b", &sides);
        assert!(svg.contains("a &lt; b") && !svg.contains("a < b"));
        // The scale is 1 ms to 100 ms: the first bar has the least length, the second the whole.
        assert!(svg.contains("width=\"640.0\""), "{svg}");
        assert!(svg.contains("width=\"1.0\""), "{svg}");
        assert!(
            svg.contains(">10 ms</text>") && svg.ends_with("</svg>\n"),
            "{svg}"
        );
        assert_eq!(svg.matches("claim → answer").count(), 1);
    }

    #[test]
    fn nothing_measured_is_still_a_document() {
        let svg = draw("none", &BTreeMap::new());
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }
}
