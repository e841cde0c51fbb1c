//! The counters of a region for Prometheus, through the `metrics` facade, so that any other
//! exporter works too.

use metrics_exporter_prometheus::PrometheusBuilder;
use pagestitch::{Budget, Chunk, Region, best_server};
use std::sync::Arc;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The exporter of the program. `PrometheusBuilder::new().install()`, with its feature, would
    // listen on a port.
    let exporter = PrometheusBuilder::new().install_recorder()?;

    let shared: Arc<[u8]> = vec![7; 1 << 20].into();
    let server = best_server()?;
    let region = Region::builder()
        .name("example")
        .record_latency()
        .chunks((0..16).map(|_| Chunk::from(Arc::clone(&shared))))
        .build(&server)?;
    let sum: u64 = region.as_slice().iter().step_by(4096).map(|&byte| u64::from(byte)).sum();
    assert_eq!(sum, 7 * (16 << 20) / 4096);

    // On each scrape, or on a timer. The meter outlives the region.
    let meter = region.meter();
    drop(region);
    meter.publish();
    // A limit of memory has counts of its own. Only a pool takes one.
    if server.pool().is_some() {
        let budget = Budget::bytes(16 << 20)?;
        let bounded = Region::builder().chunk(vec![7; 32 << 20]).budget(&budget).build(&server)?;
        assert!(bounded.as_slice().iter().all(|&byte| byte == 7));
        budget.publish("cache");
        let page = exporter.render();
        assert!(!page.contains(r#"pagestitch_budget_evictions_total{budget="cache"} 0"#), "{page}");
        assert!(page.contains(r#"pagestitch_budget_evictions_total{budget="cache"} "#), "{page}");
        assert!(page.contains("# HELP pagestitch_budget_evictions_total "), "{page}");
        for size in [
            "limit_bytes",
            "resident_bytes",
            "standby_bytes",
            "dirty_bytes",
            "lowered_bytes",
            "stalled_seconds",
        ] {
            assert!(
                page.contains(&format!("pagestitch_budget_{size}{{budget=\"cache\"}} ")),
                "{size}: {page}"
            );
        }
        for count in [
            "soft_faults",
            "refaults",
            "kept",
            "overruns",
            "write_backs",
            "write_failures",
            "pressure_reports",
        ] {
            assert!(
                page.contains(&format!("# TYPE pagestitch_budget_{count}_total counter")),
                "{count}: {page}"
            );
        }
    }
    let page = exporter.render();
    println!("{page}");
    assert!(page.contains(r#"pagestitch_pages_staged_total{region="example"}"#));
    assert!(page.contains("# HELP pagestitch_pages_staged_total "));
    assert!(page.contains(r#"pagestitch_fault_seconds{region="example",part="fill",quantile="0.99"}"#));
    Ok(())
}
